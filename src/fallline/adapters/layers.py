"""Adapters on a model: on which layers, under which names, merged into the weights, and taken off again.

A layer that gets an adapter changes its class and keeps its identity, its forward hooks, and the names of its weights.
So the state of the base model has the names it always had, with the adapters' beside them:

    model.layers.0.self_attn.q_proj.weight
    model.layers.0.self_attn.q_proj.adapters.default.lora_A
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, nearest
from ..noise import rng
from ..quantised import Made, QuantisedLinear, frozen_linear
from .base import Adapter

ALL_LINEAR = "all-linear"


class Adapted(nn.Module):
    """A linear layer with adapters.

    Attributes:
        adapters: name → its parameters.
        methods: name → the adapter, with the options of this layer.
        active: names of those that are applied, in order.
        merged: names of those that are in the weight.
        kept: the weight from before the merge, where it is kept.
    """

    weight: Any
    bias: Any
    adapters: nn.ModuleDict
    methods: dict[str, Adapter]
    active: tuple[str, ...]
    merged: tuple[str, ...]
    kept: Tensor | None
    plain: ClassVar[type[nn.Module]]  # the class it had before
    per_example: ClassVar[bool] = True  # what it computes with its adapters knows `fallline.per_example`

    def matrix(self) -> Tensor:
        """W [m, n], a view of `weight`."""
        return self.turned(cast(Tensor, self.weight))

    def turned(self, t: Tensor) -> Tensor:
        """[m, n], a view of a tensor that is stored as `weight` is."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.active:
            return F.linear(x, self.matrix(), self.bias)
        first, *others = self.active
        y = self.methods[first].linear(self.adapters[first], x, self.matrix, self.bias, self.training)
        for name in others:
            y = y + self.methods[name].apply(self.adapters[name], x, self.matrix, self.training)
        return y


class AdaptedLinear(Adapted, nn.Linear):
    """`nn.Linear` with adapters."""

    plain = nn.Linear

    def turned(self, t: Tensor) -> Tensor:
        return t


class AdaptedConv1D(Adapted, Conv1D):
    """GPT-2's linear layer, which stores Wᵀ, with adapters."""

    plain = Conv1D

    def turned(self, t: Tensor) -> Tensor:
        return t.t()


class AdaptedQuantised(Adapted, QuantisedLinear):
    """A linear layer in few bits, with adapters. They are applied beside it, not as one operation with it, which would
    keep the whole weight for the backward."""

    plain = QuantisedLinear

    def matrix(self) -> Tensor:
        return QuantisedLinear.matrix(self)

    def turned(self, t: Tensor) -> Tensor:
        return t

    def forward(self, x: Tensor) -> Tensor:
        W = Made(self.matrix)
        y = frozen_linear(x, W, self.bias)
        for name in self.active:
            y = y + self.methods[name].apply(self.adapters[name], x, W, self.training)
        return y


KINDS: Mapping[type[nn.Module], type[Adapted]] = {
    nn.Linear: AdaptedLinear,
    Conv1D: AdaptedConv1D,
    QuantisedLinear: AdaptedQuantised,
}


def inject(model: nn.Module, adapter: Adapter, *, name: str = "default", seed: int) -> None:
    """Put a built adapter on a model, as `attach` does. One that `needs` something begins later, see `begin`."""
    put(model, {path: adapter.at(path) for path in select(model, adapter.config.names())}, name, seed=seed)
    if not adapter.needs:
        for path, layer in adapted(model).items():
            if name in layer.adapters:
                with torch.no_grad():
                    layer.methods[name].init(layer.adapters[name], layer.matrix, noise_of(path, seed))


def noise_of(path: str, seed: int) -> torch.Generator:
    """Where the first values of a layer's adapter come from."""
    return rng(seed, 0, f"adapter/{path}")


def method_of(model: nn.Module, name: str) -> Adapter:
    """The method of an adapter, with the options of its first layer."""
    return next(layer.methods[name] for layer in adapted(model).values() if name in layer.methods)


def follow(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have adapters do what they do after each update (`Adapter.after_update`), from now on.

    Only some methods do anything then; where none does, the optimizer is left alone. A run of `fallline train` does
    this itself.
    """
    kinds = {type(m) for a in adapted(model).values() for m in a.methods.values()}
    if any(k.after_update is not Adapter.after_update or k.after_updates is not Adapter.after_updates for k in kinds):
        optimizer.register_step_post_hook(partial(_after_update, model))


@torch.no_grad()
def _after_update(model: nn.Module, *hooked: Any) -> None:
    together: dict[str, tuple[Adapter, list[nn.Module]]] = {}
    for layer in adapted(model).values():
        for name in layer.active:
            layer.methods[name].after_update(layer.adapters[name])
            together.setdefault(name, (layer.methods[name], []))[1].append(layer.adapters[name])
    for method, all_layers in together.values():
        method.after_updates(all_layers)


def put(model: nn.Module, chosen: Mapping[str, Adapter], name: str, *, seed: int = 0) -> None:
    """Give the layers at these paths an adapter, its parameters zero, and make it the active one. `seed`: of what the
    layers share.

    Raises:
        InputError: the name is no name or taken, the model is merged, or something else has taken over a layer.
    """
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise InputError(f"an adapter's name is letters, digits and underscores and no torch word, got {name!r}")
    if name in names(model):
        raise InputError(f"the model has an adapter {name!r} already; choose another name, or remove it")
    refuse_merged(model)
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in chosen}
    for path, layer in layers.items():
        if "forward" in vars(layer) or layer.weight.is_meta:
            raise InputError(
                f"{path} is offloaded, or its forward was replaced (device_map does both); load the model onto one "
                "device, then attach"
            )
    for path, method in chosen.items():  # refused before anything is changed
        method.shapes(*sizes(layers[path])), method.frozen(*sizes(layers[path]))
        if isinstance(layers[path], QuantisedLinear):
            refuse_gradients(method)
    common = commons(layers, next(iter(chosen.values())), seed)
    for path, method in chosen.items():
        layer = layers[path]
        if not isinstance(layer, Adapted):
            layer.__class__ = KINDS[type(layer)]
            layer.adapters, layer.methods = nn.ModuleDict(), {}
            layer.active, layer.merged, layer.kept = (), (), None
        P = zeros(method, layer)
        if common is not None:
            P.add_module("shared", common)
        layer.adapters[name], layer.methods[name] = P, method
    activate(model, name)


def zeros(method: Adapter, layer: Adapted) -> nn.Module:
    """An adapter's own tensors for a layer, all zero."""
    W = layer.matrix()
    P = nn.Module()
    for key, shape in method.shapes(*W.shape).items():
        P.register_parameter(key, nn.Parameter(torch.zeros(shape, dtype=wide(W), device=W.device)))
    for key, shape in method.frozen(*W.shape).items():
        P.register_buffer(key, torch.zeros(shape, dtype=wide(W), device=W.device))
    return P


def commons(layers: Mapping[str, nn.Module], method: Adapter, seed: int) -> nn.Module | None:
    """What an adapter's layers share, if they do: a module, so that they still share it when the model has moved."""
    found = method.shared([sizes(layer) for layer in layers.values()], noise_of("shared", seed))
    if not found:
        return None
    first = next(iter(layers.values()))
    W = cast(Tensor, first.weight)
    dtype = first.dtype if isinstance(first, QuantisedLinear) else W.dtype
    common = nn.Module()
    for key, t in found.items():
        common.register_buffer(key, t.to(W.device, dtype), persistent=False)
    return common


def sizes(layer: nn.Module) -> tuple[int, int]:
    """m and n of a linear layer's weight."""
    if isinstance(layer, QuantisedLinear):
        return layer.out_features, layer.in_features
    a, b = cast(Tensor, layer.weight).shape
    return (b, a) if isinstance(layer, Conv1D) else (a, b)


def refuse_merged(model: nn.Module) -> None:
    """Before anything is changed.

    Raises:
        InputError: adapters are merged.
    """
    if any(layer.merged for layer in adapted(model).values()):
        raise InputError("adapters are merged into the weights; unmerge them first, or remove all")


def refuse_gradients(method: Adapter) -> None:
    """Of a method for weights in few bits.

    Raises:
        InputError: it begins from their gradients.
    """
    if method.needs == "gradient":
        raise InputError(
            f"adapter {method.id!r} begins from gradients of the weights, which quantised weights do not have; take "
            "lora, or leave out 'quantise'"
        )


def wide(W: Tensor) -> torch.dtype:
    """The dtype of adapters on a weight: at least float32, their updates are small."""
    return torch.promote_types(W.dtype, torch.float32)


def select(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Paths of the layers that `targets` name, in the model's order.

    Raises:
        InputError: a target that names nothing, or something that is no linear layer; there is no layer at all; or the
            model is wrapped, so that its paths are not those of the model that others load.
    """
    if hasattr(model, "_orig_mod") or isinstance(getattr(model, "module", None), nn.Module):
        raise InputError(f"{type(model).__name__} wraps a model; give the model itself, before it is wrapped")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = {path: m for path, m in model.named_modules() if path and ".adapters" not in path}
    linear = {path for path, m in modules.items() if can_adapt(m)}
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            for path, m in modules.items():
                if isinstance(m, nn.Linear) and m is not head and not can_adapt(m):
                    kind = type(m).__name__
                    raise InputError(f"{path} is a {kind}, which cannot have an adapter; name the targets instead")
            chosen |= {path for path in linear if modules[path] is not head}
            continue
        found = {p for p in modules if p == target or p.endswith(f".{target}") or fnmatchcase(p, target)}
        if not found & linear:
            if found:
                first = min(found)
                what = f"{first} is a {type(modules[first]).__name__}, adapters go on linear layers"
            else:
                what = nearest(target, {p.rpartition(".")[2] for p in linear})
            raise InputError(f"no linear layer is named {target!r}; {what}")
        chosen |= found & linear
    if not chosen:
        raise InputError(f"{type(model).__name__} has no linear layer to put an adapter on")
    return [path for path in modules if path in chosen]


def can_adapt(module: nn.Module) -> bool:
    """Whether a layer is of a kind that adapters go on; a subclass may compute something else."""
    return type(module) in KINDS or isinstance(module, Adapted)


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """Path → layer, of those that have adapters."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Adapted)}


def names(model: nn.Module) -> list[str]:
    """The adapters of a model, in the order they came."""
    return list(dict.fromkeys(name for layer in adapted(model).values() for name in layer.adapters))


def given(model: nn.Module) -> frozenset[str]:
    """Names of an adapted model's frozen parameters, which the base model gives back. Empty without adapters."""
    found = model.named_parameters(remove_duplicate=False)
    return (
        frozenset(n for n, p in found if ".adapters." not in n and not p.requires_grad) if names(model) else frozenset()
    )


def activate(model: nn.Module, *active: str) -> None:
    """Apply these adapters, added up, and train them; all else is frozen. Without a name: the base model.

    Raises:
        InputError: no adapter of that name, or the model is merged.
    """
    known = names(model)
    for name in active:
        if name not in known:
            raise InputError(f"the model has no adapter {name!r}; {nearest(name, known)}")
    refuse_merged(model)
    model.requires_grad_(False)
    for layer in adapted(model).values():
        layer.active = tuple(name for name in active if name in layer.adapters)
        for name in layer.active:
            layer.adapters[name].requires_grad_(True)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the base model answers: a reference that shares the weights.

    Raises:
        InputError: the model is merged.
    """
    refuse_merged(model)
    before = {layer: layer.active for layer in adapted(model).values()}
    try:
        for layer in before:
            layer.active = ()
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter off, or all: layers without one are plain again, and frozen still. What is merged stays in the
    weights.

    Raises:
        InputError: no adapter of that name, or it is one of those that are merged.
    """
    gone = names(model) if name is None else [name]
    for n in gone:
        if n not in names(model):
            raise InputError(f"the model has no adapter {n!r}; {nearest(n, names(model))}")
    if name is not None:
        refuse_merged(model)
    for layer in adapted(model).values():
        for n in [n for n in gone if n in layer.adapters]:
            take_off(layer, n)


def take_off(layer: Adapted, name: str) -> None:
    """Without its last adapter a layer is plain again."""
    del layer.adapters[name], layer.methods[name]
    layer.active = tuple(n for n in layer.active if n != name)
    if not layer.adapters:
        plain = layer.plain
        for attribute in ("adapters", "methods", "active", "merged", "kept"):
            delattr(layer, attribute)
        layer.__class__ = plain  # type: ignore[assignment]
