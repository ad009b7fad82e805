"""What one forward and backward hold, by tracing them on shapes.

The code that trains is what is traced: the 🤗 model, the adapter, the objective with its chunked head, the estimator.
Decoder layers that are alike are traced twice over, in models of `FEW` layers: what they hold grows by the same number
of bytes with every layer, in each of the phases

    forward     until the decoder is through
    loss        the head and the objective, to the last layer's backward
    backward    of the last layer, while all others' activations wait
    gradients   of the first layer and what lies before it, when nearly all gradients are there

and between the last layer and the first the sum only moves from one of these heights to the other. A model whose layers
differ is traced whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ...adapters.layers import disabled, inject
from ...cross_entropy import IGNORED, planned_for
from ...footprint import Held, Shapes
from ...metrics import Clock
from ...models.base import ModelOptions, finish
from ...problem import Problem
from ...recipe import Choice
from ...reference import Reference
from ...tokens import assume_plain_head

Phase = Literal["forward", "loss", "backward", "gradients"]
PHASES: tuple[Phase, ...] = ("forward", "loss", "backward", "gradients")

FEW = (2, 3)
"""Layers of the models that stand for all."""


LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Options of 🤗 configurations that change logits after the head, so that the loss forms all of them."""


class Moment(NamedTuple):
    """Bytes beyond the weights in a phase.

    Attributes:
        total: at its height. rest: the most of all but gradients, which may be at another time.
    """

    total: float
    rest: float

    @property
    def gradients(self) -> float:
        """At the height, at least."""
        return self.total - self.rest

    def after(self, gradients: float) -> Moment:
        """The same where gradients of earlier micro-batches lie there all the time."""
        return Moment(gradients + self.rest, self.rest)


@dataclass(frozen=True)
class Pass:
    """One forward and backward.

    Attributes:
        shape: the model's 🤗 configuration.
        dtype: of weights and activations.
        options: how the model computes.
        adapter, objective, estimator: as in a recipe.
        rows, length: of the micro-batch; rows hold two documents each.
        device: kind of device it will run on.
    """

    shape: PretrainedConfig
    dtype: torch.dtype
    options: ModelOptions
    adapter: Choice
    objective: Choice
    estimator: Choice
    rows: int
    length: int
    device: str


class Traced(NamedTuple):
    """What a pass takes: the height of every phase, and floating-point operations."""

    heights: Mapping[Phase, Moment]
    flops: float


def trace(asked: Pass, *, layers: int | None) -> Traced:
    """Trace a pass.

    Args:
        asked: what is traced.
        layers: how many alike layers the model has; None where they differ, or nobody knows.
    """
    if layers is None or layers <= max(FEW):
        return _trace(asked, None)
    a, b = (_trace(asked, few) for few in FEW)
    times = (layers - FEW[0]) / (FEW[1] - FEW[0])

    def line(x: float, y: float) -> float:
        return x + times * (y - x)

    found = {p: Moment(*map(line, a.heights[p], b.heights[p])) for p in PHASES}
    return Traced(found, line(a.flops, b.flops))


def stand_in(shape: PretrainedConfig) -> LlamaConfig:
    """A Llama of the same sizes; of a mixture of experts, with what one token passes through. Raises anything where the
    configuration does not have them."""
    text = shape.get_text_config()
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", 4 * text.hidden_size)
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=inner * getattr(text, "num_experts_per_tok", 1),
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=getattr(text, "num_attention_heads", 1),
    )


def skeleton(shape: PretrainedConfig, dtype: torch.dtype, options: ModelOptions) -> PreTrainedModel:
    """The model without values, inside `Shapes`."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=options.attention)
    model.tie_weights()
    model.train()
    text = shape.get_text_config()
    assume_plain_head(model, all(getattr(text, name, None) in (None, 1) for name in LOGITS))
    found: PreTrainedModel = finish(model, options)
    return found


def alike(model: PreTrainedModel) -> int | None:
    """How many decoder layers a model has, if they are all alike."""
    stack = layers_of(model)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    shapes = {tuple((name, *p.shape) for name, p in layer.named_parameters()) for layer in stack}
    return len(stack) if len(shapes) == 1 and len(kinds) < 2 else None


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers: its longest list of modules."""
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    longest: nn.ModuleList = max(lists, key=len, default=nn.ModuleList())
    return list(longest)


def fewer(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration of the same model with so many layers."""
    found = deepcopy(shape)
    text = found.get_text_config()
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = kinds[:layers]
    return found


def _trace(asked: Pass, layers: int | None) -> Traced:
    shape = asked.shape if layers is None else fewer(asked.shape, layers)
    with Shapes() as held, planned_for(asked.device):
        model = skeleton(shape, asked.dtype, asked.options)
        adapter = asked.adapter.module.build(asked.adapter.options)
        if adapter is not None:
            inject(model, adapter, seed=0)
        objective: Any = asked.objective.module.build(asked.objective.options)
        if getattr(objective, "reference", False) and hasattr(objective, "hold"):
            # the model itself: of the same sizes, and nothing is copied
            objective.hold(Reference(model, "", (lambda model: nullcontext()) if adapter is None else disabled))
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        question = problem(asked, model, objective, params, torch.device("cpu"))
        seen = Marks(held, model, params)
        before = held.flops
        asked.estimator.module.build(asked.estimator.options)(question)
        return Traced(seen.end(), held.flops - before)


class Marks:
    """Follows a pass from phase to phase."""

    def __init__(self, held: Held, model: PreTrainedModel, params: Mapping[str, nn.Parameter]) -> None:
        self.held, self.found = held, dict.fromkeys(PHASES, Moment(0, 0))
        self.phase: Phase = "forward"
        self.base, held.aside = held.now, 0
        held.begin()
        self.hooks = [p.register_post_accumulate_grad_hook(self._grade) for p in params.values()]
        stack = layers_of(model)
        self.watched = {id(stack[i]): i - len(stack) if i else 0 for i in {0, len(stack) - 1, max(0, len(stack) - 2)}}
        self.hooks += [layer.register_forward_hook(self._after) for layer in stack]

    def _after(self, layer: nn.Module, args: Any, output: Any) -> None:
        t = output[0] if isinstance(output, tuple) else output
        if not t.requires_grad:
            return  # a model that has values: its head is being tried
        place = self.watched.pop(id(layer), None)  # once: a checkpointed layer runs again
        if place is None:
            return
        if place == -1:
            self._next("loss")
            t.register_hook(lambda g: self._next("backward"))
        elif place == 0:
            t.register_hook(lambda g: self._next("gradients"))
        else:
            t.register_hook(lambda g: self._note("backward"))

    def _grade(self, p: Tensor) -> None:
        self.held.aside += p.numel() * p.element_size()

    def _note(self, phase: Phase) -> None:
        """What was held since the last border belongs to this phase."""
        before, held = self.found[phase], self.held
        self.found[phase] = Moment(max(before.total, held.height - self.base), max(before.rest, held.rest - self.base))
        held.begin()

    def _next(self, phase: Phase) -> None:
        self._note(self.phase)
        self.phase = phase

    def end(self) -> dict[Phase, Moment]:
        self._note(self.phase)
        for hook in self.hooks:
            hook.remove()
        return self.found


def problem(
    asked: Pass,
    model: nn.Module,
    objective: nn.Module,
    params: dict[str, nn.Parameter],
    device: torch.device,
) -> Problem:
    """One micro-batch of rows that hold two documents each, of which the last token asks nothing."""
    rows, length = asked.rows, asked.length
    half = torch.arange(length) % max(1, (length + 1) // 2)
    place = (torch.arange(length) >= (length + 1) // 2).long()
    batch = {
        "input_ids": torch.ones(rows, length, dtype=torch.int64),
        "labels": torch.ones(rows, length, dtype=torch.int64),
        "position_ids": half.expand(rows, length).clone(),
        "segment": place + 2 * torch.arange(rows).unsqueeze(1),
        "side": (half >= (length + 3) // 4).long().expand(rows, length).clone(),  # each of two sequences, for pairs
        "domain": torch.arange(2 * rows) % 2,
        "example_id": torch.arange(2 * rows),
        "weight": torch.ones(2 * rows),
    }
    batch["labels"][:, -1] = IGNORED
    for name, shape in getattr(objective, "columns", {}).items():
        batch[name] = torch.zeros(2 * rows, *shape, dtype=torch.float64)
    told: Any = getattr(objective, "token_columns", lambda model: {})
    for name, (shape, dtype) in told(model).items():
        batch[name] = torch.zeros(rows, length, *shape, dtype=dtype)
    batch = {name: column.to(device) for name, column in batch.items()}
    run: Any = SimpleNamespace(  # what a problem asks of a run
        model=model, objective=objective, estimator=None, optimizer=None, parts={}, coefficients={}, clip=None,
        seed=0, step=0, device=device, clock=Clock(device), micro=rows,
    )  # fmt: skip
    counts: Any = objective
    total = dict.fromkeys([*counts.count(batch), ""], torch.ones((), device=device))
    return Problem(run, [batch], total, params, [2 * rows])
