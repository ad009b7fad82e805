"""Adapters added into the weights, and taken out again."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..quantised import QuantisedLinear
from .gated import NO_CHANGE, gated
from .layers import adapted, wide


@torch.no_grad()
def merge(model: nn.Module, *, keep: bool = False) -> None:
    """Add the active adapters into the weights, W ← W + ΔW, summed in at least float32 and rounded to W's dtype.

    Args:
        model: afterwards it computes as fast as without adapters.
        keep: keep the old weights too, as much memory again, so that `unmerge` brings them back bit for bit.

    Raises:
        InputError: there is nothing to merge, an adapter counts by a gate, a weight is used elsewhere too (a tied
            head), or weights are quantised: what rounding to few bits takes away is larger than most adapters' changes.
            The model is then as it was.
    """
    layers = {path: layer for path, layer in adapted(model).items() if layer.active and not layer.merged}
    if not layers:
        raise InputError("there is no active adapter to merge")
    if gated(model):
        raise InputError(NO_CHANGE)
    few = next(((path, layer) for path, layer in layers.items() if isinstance(layer, QuantisedLinear)), None)
    if few is not None:
        raise InputError(
            f"the weight of {few[0]} is quantised to {few[1].kind}, too coarse to merge into; save the adapter, and "
            "merge it into the model in full precision (of a run: fallline export RUN --merge)"
        )
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(path)
    for path, layer in layers.items():
        others = [other for other in owners[id(layer.weight)] if other != path]
        if others:
            raise InputError(f"the weight of {path} is also that of {others[0]}: untie them before merging")
    for layer in layers.values():
        W = layer.matrix()
        delta = sum(layer.methods[n].delta(layer.adapters[n], layer.matrix) for n in layer.active)
        layer.kept = layer.weight.detach().clone() if keep else None
        W.copy_(W.to(wide(W)) + cast(Tensor, delta))
        layer.merged = layer.active


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Bring back the weights from before `merge`, bit for bit.

    Raises:
        InputError: nothing is merged, or the weights were not kept: subtracting would not bring back the same bits.
    """
    layers = [layer for layer in adapted(model).values() if layer.merged]
    if not layers:
        raise InputError("there is nothing to unmerge")
    if any(layer.kept is None for layer in layers):
        raise InputError("the weights from before were not kept: merge with keep=True")
    for layer in layers:
        layer.weight.copy_(cast(Tensor, layer.kept))
        layer.kept, layer.merged = None, ()
