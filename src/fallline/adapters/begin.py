"""Adapters that begin from data: from gradients of the weights, or inputs of the layers, before step 0.

In a run this is a part; the data are the first rows of what it trains on. In a loop of one's own `attach` does it, with
the batches it is given. The base model is asked, in evaluation mode. Of gradients no more are held at a time than the
adapter's own gradient and two moments will take, or than an eighth of all, where that is more, or one
(`fallline.calibrate.gradients`); of inputs one layer's at a time, and the directions in which each varies
(`fallline.calibrate_inputs`). A method that begins from inputs has the rank on each layer that these directions earn,
which may be none.

The inputs that count are those of tokens after which a label is predicted: there the loss is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import calibrate
from ..calibrate import Batch, Data
from ..calibrate_inputs import directions
from ..catalog import find
from ..contracts import Change
from ..errors import InputError
from ..step import Run
from ..tokens import IGNORED
from .layers import Adapted, adapted, disabled, inject, method_of, noise_of, remove
from .rerank import resize, sizes


class Begin:
    """The part of a run that lets an adapter begin from its data.

    Args:
        name: of the adapter.

    Attributes:
        ranks: path → rank, where the data have changed them; part of the run's state.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self.ranks: dict[str, int] = {}

    def check(self, run: Run) -> None:
        """
        Raises:
            InputError: the run is private: what is seen here no ε counts.
        """
        if hasattr(run.estimator, "secret"):
            raise InputError(
                f"adapter {method_of(run.model, self.name).id!r} begins from the data, which the guarantee of a "
                "private run does not cover; take lora"
            )

    def setup(self, run: Run) -> Sequence[Change]:
        """Once, before step 0; a run that goes on has the result in its state."""
        data = data_of(run, method_of(run.model, self.name).config.rows)
        changes = begin(run.model, self.name, data, seed=run.seed)
        self.ranks = sizes(run.model, self.name) if changes else {}
        return changes

    def restructure(self, run: Run, state: Mapping[str, Any]) -> Sequence[Change]:
        self.ranks = dict(state["ranks"])
        return resize(run.model, self.name, self.ranks) if self.ranks else ()

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": self.ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`restructure` has done it."""


def attach(
    model: nn.Module,
    id: str,
    *,
    name: str = "default",
    seed: int = 0,
    data: Iterable[Mapping[str, Any]] | None = None,
    **options: Any,
) -> Any:
    """Put an adapter on a model, in place, and freeze everything else; the other adapters it has become inactive.

    Args:
        model: any module with `nn.Linear` or GPT-2's `Conv1D` layers.
        id: the method, as `fallline methods` lists it.
        name: of this adapter; a model can have several.
        seed: of the initial values, with the layer's path.
        data: batches to begin from, for a method that does (`lora-ga`, `eva`, …): what the model is called with, labels
            included; a list or a DataLoader that gives the same each time.
        options: the method's.

    Returns:
        The model.

    Raises:
        InputError: unknown method or option; no or impossible target layers; the name is taken; the model is merged or
            wrapped; a method that begins from data has none, or one that does not has some; one that changes its shape
            during the run, or is for runs only.

    Example:
        >>> model = attach(nn.Sequential(nn.Linear(4, 3)), "lora", rank=2)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.adapters.default.lora_A', '0.adapters.default.lora_B']
    """
    module = find("adapter", id).load()
    adapter = module.build(module.Config.from_mapping(options, f"adapter {id!r}"))
    if adapter is None:
        raise InputError(f"{id!r} stands for no adapter in a recipe; there is nothing to attach")
    if bool(adapter.needs) != (data is not None):
        what = "begins from data: give 'data'" if adapter.needs else "does not begin from data: leave out 'data'"
        raise InputError(f"adapter {id!r} {what}")
    if adapter.resizes:
        raise InputError(
            f"adapter {id!r} with these options changes its shape during the run, which 'fallline train' follows and "
            "other loops do not; use a recipe"
        )
    if adapter.runs_only:
        raise InputError(f"adapter {id!r} {adapter.runs_only}, which only 'fallline train' does; use a recipe")
    active = {layer: layer.active for layer in adapted(model).values()}
    trained = {p: p.requires_grad for p in model.parameters()}
    inject(model, adapter, name=name, seed=seed)
    if data is not None:
        try:
            begin(model, name, data_from(model, data, id), seed=seed)
        except BaseException:  # the model is as it was
            remove(model, name)
            for layer, before in active.items():
                layer.active = before
            for p, required in trained.items():
                p.requires_grad_(required)
            raise
    return model


def data_of(run: Run, rows: int) -> Data:
    """The first rows of what a run trains on, with its objective: the loss is that of one step with all of them."""
    source: Any = run.source

    def batches() -> Iterator[Batch]:
        for batch in source.batches(run.micro, rows):
            moved = {k: v.to(run.device) for k, v in batch.items()}
            yield run.objective.prepare(run, moved) if hasattr(run.objective, "prepare") else moved

    total: dict[str, Tensor] = {}
    for batch in batches():
        for term, count in run.objective.count(cast(Any, batch)).items():
            total[term] = total.get(term, torch.zeros_like(count.sum())) + count.sum()

    def loss(batch: Batch) -> Tensor:
        value = run.objective(run.model, cast(Any, batch)).value
        return torch.stack([v.sum() / total[term].clamp(min=1) for term, v in value.items()]).sum()

    def counted(batch: Batch) -> Tensor | None:
        return batch["labels"] != IGNORED if "labels" in batch else None  # of the token that follows

    return Data(batches, loss, counted)


def data_from(model: nn.Module, batches: Iterable[Mapping[str, Any]], id: str) -> Data:
    """Batches that a 🤗 model takes as keywords and answers with a loss: the mean over them.

    Raises:
        InputError: they can be gone through only once, or there are none.
    """
    if isinstance(batches, Iterator):
        raise InputError(f"'data' of {id!r} is gone through several times; give a list or a DataLoader")
    number = sum(1 for _ in batches)

    def loss(batch: Batch) -> Tensor:
        found = model(**batch)
        loss: Tensor | None = getattr(found, "loss", None)
        if loss is None:
            raise InputError(f"the model gives no loss on the 'data' of {id!r}; put 'labels' into its batches")
        return loss / number

    def counted(batch: Batch) -> Tensor | None:
        labels, real = batch.get("labels"), batch.get("attention_mask")
        keep = None
        if labels is not None and labels.ndim == 2:  # of the token itself: the model shifts them
            keep = F.pad(labels[:, 1:] != IGNORED, (0, 1))
        if real is not None and real.ndim == 2:
            keep = real.bool() if keep is None else keep & real.bool()
        return keep

    return Data(lambda: iter(batches), loss, counted)


def begin(model: nn.Module, name: str, data: Data, *, seed: int) -> Sequence[Change]:
    """Let an adapter that is on a model begin from data.

    Args:
        model: has it.
        name: of the adapter.
        data: to begin from.
        seed: with a layer's path, of what is random.

    Returns:
        What changed of the parameters that are trained, where layers got other ranks.

    Raises:
        InputError: no data, a loss that is not finite, an adapted weight that the model also uses elsewhere, where its
            gradient is asked for, or gradients that are not finite or all zero; or what `calibrate_inputs.directions`
            refuses.
    """
    layers = {path: layer for path, layer in adapted(model).items() if name in layer.adapters}
    if method_of(model, name).needs == "gradient":
        from_gradients(model, layers, name, data, seed)
        return ()
    return from_inputs(model, layers, name, data, seed)


MOST_PASSES = 8
"""Passes over the data, about, that gradients may take. An adapter of few parameters, whose training needs next to no
memory of its own, would else take one for each weight; so its beginning holds an eighth of all gradients at a time."""


def from_gradients(model: nn.Module, layers: Mapping[str, Adapted], name: str, data: Data, seed: int) -> None:
    """`begin`, with the gradients of the weights."""
    method = method_of(model, name)
    weights = {path: cast(nn.Parameter, layer.weight) for path, layer in layers.items()}
    shared = calibrate.shared_weights(model, list(weights.values()))
    if shared is not None:
        raise InputError(
            f"{method.id!r} begins from gradients of the weights, and {shared} is used in two places; leave its layer "
            "out of 'targets'"
        )
    trained = sum(p.numel() for layer in layers.values() for p in layer.adapters[name].parameters())
    whole = sum(p.numel() * calibrate.wide(p).itemsize for p in weights.values())
    room = max(12 * trained, whole // MOST_PASSES)
    told = False
    with disabled(model), calibrate.evaluating(model):
        for path, G in calibrate.gradients(model, weights, data, room):
            if not G.isfinite().all():
                raise InputError(
                    f"the gradient of {path} on the data to begin from is not finite; look at model and data, or take "
                    "a wider dtype"
                )
            told = told or bool(G.any())
            layer = layers[path]
            with torch.no_grad():
                P = layer.adapters[name]
                layer.methods[name].begin(P, layer.matrix, noise_of(path, seed), layer.turned(G))
    if not told:
        raise InputError(
            f"{method.id!r} begins from gradients of the weights, and all are zero on the data to begin from: no token "
            "of it is a label, or the loss does not depend on the layers of 'targets'"
        )


def from_inputs(model: nn.Module, layers: Mapping[str, Adapted], name: str, data: Data, seed: int) -> Sequence[Change]:
    """`begin`, with the directions in which inputs vary most; the sum of the ranks stays."""
    options = method_of(model, name).config
    with disabled(model), calibrate.evaluating(model):
        found = directions(
            model,
            layers,
            data,
            count=round(options.rank * options.rho),
            budget=options.rank * len(layers),
            tau=options.tau,
            noise=lambda path: noise_of(path, seed),
        )
    changes = resize(model, name, {path: len(V) for path, V in found.items() if len(V)})
    for path in sizes(model, name):
        layer = layers[path]
        with torch.no_grad():
            layer.methods[name].begin(layer.adapters[name], layer.matrix, noise_of(path, seed), found[path])
    return changes
