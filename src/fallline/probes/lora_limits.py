"""How large queries, keys and values are, beside the bound below which attention with a LoRA has fast gradients.

For the h-th head, X [L, n] the inputs of the attention layer, W and ΔW the rows of base and adapter that belong to it:

    Γ_Q = max |X Wᵀ| / d^{1/4},  Γ_K likewise,  Γ_V = max |X Wᵀ|        each of W, of ΔW, and of W + ΔW
    ratio = Γ / √(ln L)

Queries and keys carry half of attention's 1/√d each. The theory says that gradients of a LoRA in attention can be had
in almost linear time in L, to a small error, where all ratios are below a constant, and not where they are well above
(unless SETH fails). Base and adapter count apart, since the products of the two enter apart. Its constants are not
known, so 1 is a mark and no threshold; nothing here makes anything faster.

X, before rotation and without bias, is that of the first rows the run trains on, in evaluation mode. L is the longest
piece of a packed row; padding is left out. Costs one forward of those rows every `every` steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate import evaluating
from ..calibrate_inputs import seeing
from ..catalog import Card
from ..contracts import Change, Signals
from ..errors import InputError
from ..isolation import isolated
from ..options import Options, option
from ..step import Run

CARD = Card(
    id="lora-limits",
    kind="probe",
    summary="Sizes of queries, keys and values of every head, base and adapter apart, over the bound √(ln L).",
    paper="Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models",
    year=2024,
    equation="max |X Wᵀ| / d^{1/4} / √(ln L) by head, of W, ΔW and W + ΔW; of values without d^{1/4}",
    needs=("attention with q_proj, k_proj and v_proj, or with c_attn or qkv_proj",),
    flops="one forward of `rows` rows every `every` steps",
    checked="equals the definition in float64 on inputs taken from the model's own hidden states, with grouped heads, "
    "with GPT-2's fused layer, and over packed and padded rows; base and adapter add up for every adapter; a run with "
    "the probe is bit-identical to one without",
    departures="the theory's constants are unknown: ratios are reported, not judged. The approximate backward, which "
    "pays for heads of a few dimensions only, is not here",
    tags=("metrics", "adapter", "LoRA", "attention", "norm", "theory"),
)

KINDS: Mapping[str, str] = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "c_attn": "qkv", "qkv_proj": "qkv"}
"""A layer's name → what it makes, one after another."""

Ratios = dict[str, dict[str, dict[str, Tensor]]]
"""Attention layer → q, k or v → ``base``, ``adapter`` (where it has one) or ``both`` → [heads]."""


@dataclass(frozen=True)
class Config(Options):
    """When to look, and at how much."""

    every: int = option(50, "steps between looks", gt=0)
    rows: int = option(4, "rows of the training data to look at", gt=0)


@dataclass(frozen=True)
class Heads:
    """How outputs are cut into heads: how many, and d, the size of each."""

    queries: int
    values: int
    size: int

    @classmethod
    def of(cls, model: Any) -> Heads:
        """What a 🤗 model's configuration says; nothing it does not say is a head of 0."""
        told = model.config.get_text_config()
        queries = getattr(told, "num_attention_heads", None) or 0
        values = getattr(told, "num_key_value_heads", None) or queries
        size = getattr(told, "head_dim", None) or (told.hidden_size // queries if queries else 0)
        return cls(queries, values, size)

    def split(self, made: str) -> list[int]:
        """Outputs that belong to each of q, k, v."""
        return [self.size * (self.queries if one == "q" else self.values) for one in made]


def layers(model: Any) -> dict[str, nn.Module]:
    """Path → layer that makes queries, keys or values.

    Raises:
        InputError: there is none, or one has other outputs than its heads say.
    """
    heads = Heads.of(model)
    found = {path: m for path, m in model.named_modules() if path.rpartition(".")[2] in KINDS and hasattr(m, "weight")}
    if not found:
        raise InputError(
            f"probe 'lora-limits' knows attention by layers named {', '.join(KINDS)}; {type(model).__name__} has none"
        )
    for path, layer in found.items():
        m, wanted = len(matrix(layer)), sum(heads.split(KINDS[path.rpartition(".")[2]]))
        if m != wanted:
            raise InputError(f"probe 'lora-limits': {path} has {m} outputs, its heads would have {wanted}")
    return found


def matrix(layer: Any) -> Tensor:
    """W [m, n] of a linear layer; GPT-2's stores the other way round."""
    W: Tensor = layer.weight
    return W if isinstance(layer, nn.Linear) else W.t()


def change(layer: Any, x: Tensor) -> Tensor | None:
    """x ΔWᵀ of the adapters on a layer that are active; None: there are none."""
    found = [
        layer.methods[name].apply(layer.adapters[name], x, layer.matrix, False) for name in getattr(layer, "active", ())
    ]
    return torch.stack(found).sum(0) if found else None


def sizes(layer: Any, x: Tensor, made: str, heads: Heads) -> dict[str, dict[str, Tensor]]:
    """Γ of each head of a layer.

    Args:
        x: [t, n] its inputs. made: which of q, k, v it makes.

    Returns:
        q, k or v → part → [heads], in float32 at least.
    """
    W = matrix(layer)
    base = F.linear(x.to(W.dtype), W).to(torch.promote_types(W.dtype, torch.float32))
    more = change(layer, x)
    by = {"base": base, "both": base}
    if more is not None:
        by |= {"adapter": more.to(base.dtype), "both": base + more.to(base.dtype)}
    found: dict[str, dict[str, Tensor]] = {one: {} for one in made}
    for part, y in by.items():
        for one, columns in zip(made, y.split(heads.split(made), dim=-1), strict=True):
            largest = columns.unflatten(-1, (-1, heads.size)).abs().amax((0, 2))
            found[one][part] = largest if one == "v" else largest / heads.size**0.25
    return found


@torch.no_grad()
def ratios(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> Ratios:
    """Γ / √(ln L) over some batches, the largest of each head.

    Raises:
        InputError: no piece has two tokens, so that ln L is not above 0.
    """
    watched, heads = layers(model), Heads.of(model)
    found: Ratios = {}
    longest = 0

    def see(real: Tensor, path: str, x: Tensor) -> None:
        made = sizes(watched[path], x[real], KINDS[path.rpartition(".")[2]], heads)
        into = found.setdefault(path.rpartition(".")[0], {})
        for one, by in made.items():
            before = into.setdefault(one, by)
            into[one] = {part: torch.maximum(value, before[part]) for part, value in by.items()}

    for batch in batches:
        ids = batch["input_ids"]
        real = batch["segment"] >= 0 if "segment" in batch else torch.ones_like(ids, dtype=torch.bool)
        at = batch.get("position_ids", torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        longest = max(longest, int(at[real].max()) + 1)
        with seeing(watched, partial(see, real)):
            model.get_decoder()(**isolated(model, batch))
    if longest < 2:
        raise InputError("probe 'lora-limits' needs pieces of two tokens or more")
    bound = math.sqrt(math.log(longest))
    return {
        path: {one: {part: value / bound for part, value in by.items()} for one, by in made.items()}
        for path, made in found.items()
    }


class LoraLimits:
    """Looks after the first step, every `every` steps from there, and after the last."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._last: Ratios = {}

    def check(self, run: Run) -> None:
        """
        Raises:
            InputError: a model whose attention is not known.
        """
        layers(run.model)

    def after_step(self, run: Run, signals: Signals) -> Sequence[Change]:
        self._last = {}
        if run.step % self.config.every == 0 or run.step + 1 == run.steps:
            source: Any = run.source
            batches = source.batches(run.micro, self.config.rows)
            with evaluating(run.model):
                self._last = ratios(run.model, ({k: v.to(run.device) for k, v in b.items()} for b in batches))
        return ()

    def metrics(self) -> dict[str, Any]:
        """``lora_limits`` when the last step was looked at, else nothing: of q, k and v, for each part, the share of
        heads ``below`` 1 and the ``largest`` ratio; and all ratios, ``heads``, by attention layer."""
        if not self._last:
            return {}
        parts: dict[str, dict[str, list[Tensor]]] = {}
        for made in self._last.values():
            for one, by in made.items():
                for part, value in by.items():
                    parts.setdefault(one, {}).setdefault(part, []).append(value)
        whole = {one: {part: torch.cat(values) for part, values in by.items()} for one, by in parts.items()}
        return {
            "lora_limits": {
                "below": {one: {p: float((v < 1).double().mean()) for p, v in by.items()} for one, by in whole.items()},
                "largest": {one: {p: float(v.max()) for p, v in by.items()} for one, by in whole.items()},
                "heads": {
                    path: {one: {p: v.tolist() for p, v in by.items()} for one, by in made.items()}
                    for path, made in self._last.items()
                },
            }
        }


def build(config: Config) -> LoraLimits:
    return LoraLimits(config)
