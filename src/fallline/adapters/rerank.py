"""Ranks of an adapter that differ from layer to layer, and change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from ..contracts import Change
from .layers import Adapted, adapted, take_off, zeros


def ranks(model: nn.Module, name: str) -> dict[str, int]:
    """Path → rank of an adapter there."""
    return {path: layer.methods[name].config.rank for path, layer in adapted(model).items() if name in layer.adapters}


def rerank(model: nn.Module, name: str, wanted: Mapping[str, int]) -> list[Change]:
    """Give an adapter the ranks that are `wanted`, by path; where another one was, its tensors are zero afterwards.

    A layer for which none or 0 is wanted loses the adapter.

    Returns:
        What changed of the parameters that are trained.
    """
    changes = []
    for path, rank in ranks(model, name).items():
        if wanted.get(path, 0) == rank:
            continue
        layer = cast(Adapted, model.get_submodule(path))
        before = layer.adapters[name]
        after = nn.Module()
        if wanted.get(path, 0):
            layer.methods[name] = layer.methods[name].at_rank(wanted[path])
            layer.adapters[name] = after = zeros(layer.methods[name], layer)
        else:
            take_off(layer, name)
        now = dict(after.named_parameters())
        for key, p in before.named_parameters():
            changes.append(Change(f"{path}.adapters.{name}.{key}", p, now.get(key)))
    return changes
