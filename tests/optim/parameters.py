"""A handful of parameters of every role, of ragged shapes, and gradients for them that are hard on a rule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fallline.catalog import find
from fallline.noise import rng
from fallline.optim.base import Named
from fallline.optim.roles import Role

SHAPES: dict[str, tuple[Role, tuple[int, ...]]] = {
    "embed.weight": ("embedding", (11, 5)),
    "layers.0.up.weight": ("matrix", (7, 3)),
    "layers.0.down.weight": ("matrix", (3, 7)),
    "layers.0.row.weight": ("matrix", (1, 6)),
    "layers.0.column.weight": ("matrix", (6, 1)),
    "layers.0.conv.weight": ("matrix", (4, 3, 2)),
    "layers.0.lora_A.weight": ("adapter", (2, 3)),
    "norm.weight": ("vector", (5,)),
    "gate": ("vector", ()),
    "lm_head.weight": ("head", (11, 5)),
    "objective.tau": ("objective", (3,)),
}

Parameters = dict[str, tuple[nn.Parameter, Role]]


def parameters(dtype: torch.dtype = torch.float64) -> Parameters:
    """Fresh parameters, always of the same values."""
    return {
        name: (nn.Parameter(_first(name, shape).to(dtype, copy=True)), role) for name, (role, shape) in SHAPES.items()
    }


@cache
def _first(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=rng(0, 0, name), dtype=torch.float64)


def gradient(step: int, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """This step's gradient: its scale swings by 10⁴ over steps, and one row of a matrix is zero now and then."""
    return _gradient(step, name, shape, dtype).clone()


@cache  # every row of the table is given the same
def _gradient(step: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    g = torch.randn(shape, generator=rng(1, step, name), dtype=torch.float64) * 10.0 ** (-2 * (step % 3))
    if len(shape) > 1 and shape[0] > 1:
        g[step % shape[0]] = 0
        if name == "embed.weight":
            g[step % 3 :: 3] = 0  # words that did not occur
    return g.to(dtype)


def make(id: str, params: Any, options: Mapping[str, Any]) -> Named:
    """The optimizer `id` with checked options, as a recipe makes it."""
    module = find("optimizer", id).load()
    return module.build(module.Config.from_mapping(options, id), params)


def train(
    optimizer: torch.optim.Optimizer, params: Parameters, start: int, stop: int, without: tuple[str, ...] = ()
) -> None:
    """Steps start … stop − 1 with the gradients of `gradient`, none for the parameters `without`."""
    for step in range(start, stop):
        for name, (p, _) in params.items():
            p.grad = None if name in without else gradient(step, name, tuple(p.shape), p.dtype)
        optimizer.step()


def values(params: Parameters) -> dict[str, Tensor]:
    """Copies of the parameters by name."""
    return {name: p.detach().clone() for name, (p, _) in params.items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal to the bit, dtypes included."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def through_disk(tree: Any) -> Any:
    """State as it comes back from a file: tensors through safetensors, all else must be numbers or text."""
    if isinstance(tree, Mapping):
        assert all(type(key) is str for key in tree)
        return {key: through_disk(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(through_disk(value) for value in tree)
    if isinstance(tree, Tensor):
        return load_tensors(save_tensors({"x": tree.contiguous()}))["x"]
    assert type(tree) in (bool, int, float, str), tree
    return tree


def tensors(tree: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of a state by path."""
    if isinstance(tree, Tensor):
        return {path: tree}
    inner = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    return {k: v for key, value in inner for k, v in tensors(value, f"{path}/{key}").items()}
