"""Sizes of an adapter, such as ranks, that differ from layer to layer, and change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ..contracts import Change
from .base import Layers
from .layers import Adapted, adapted, take_off, zeros


def layers_of(model: nn.Module, name: str) -> Layers:
    """Path → an adapter's method there, and its tensors."""
    return {
        path: (layer.methods[name], layer.adapters[name])
        for path, layer in adapted(model).items()
        if name in layer.adapters
    }


def sizes(model: nn.Module, name: str) -> dict[str, int]:
    """Path → size of an adapter there."""
    return {path: method.size for path, (method, _) in layers_of(model, name).items()}


def resize(
    model: nn.Module,
    name: str,
    wanted: Mapping[str, int],
    noise: Callable[[str], torch.Generator] | None = None,
) -> list[Change]:
    """Give an adapter the sizes that are `wanted`, by path; a layer that is not among them loses the adapter.

    Args:
        model: has it.
        name: of the adapter.
        wanted: path → size.
        noise: where the values of what is new come from, by path: then what was learned is carried over. None: tensors
            of another shape are zero afterwards, to be filled.

    Returns:
        What changed of the parameters that are trained. One of a shape that stays is the same parameter.
    """
    changes = []
    for path, (method, before) in layers_of(model, name).items():
        if wanted.get(path) == method.size:
            continue
        layer = cast(Adapted, model.get_submodule(path))
        after, index = nn.Module(), cast(Mapping[str, Tensor], {})
        if path in wanted:
            layer.methods[name] = method = method.at_size(wanted[path])
            after = zeros(method, layer)
            kept = dict(before.named_parameters()) | dict(before.named_buffers())
            for key, t in [*after.named_parameters(), *after.named_buffers()]:
                if key in kept and kept[key].shape == t.shape:
                    setattr(after, key, kept[key])
            if noise is not None:
                with torch.no_grad():
                    index = method.carry(before, after, noise(path))
            layer.adapters[name] = after
        else:
            take_off(layer, name)
        old, new = dict(before.named_parameters()), dict(after.named_parameters())
        for key in old | new:
            p, q = old.get(key), new.get(key)
            if p is not q:
                changes.append(Change(f"{path}.adapters.{name}.{key}", p, q, index.get(key)))
    return changes


def take(before: Tensor, after: Tensor, dim: int, which: Tensor) -> Tensor:
    """Copy the slices `which` of `before` along `dim` into `after`, which has just these; the `Change.index` of it."""
    after.copy_(before.index_select(dim, which))
    places = torch.arange(before.numel(), device=before.device).view(before.shape)
    return places.index_select(dim, which)
