"""Any transform with its state in 8 bits: a fourth of the bytes, for what it remembers of each element.

    from fallline.optim.chain import chain
    from fallline.optim.eight_bit import EightBit
    from fallline.optim.moments import NesterovEma
    from fallline.optim.orthogonalise import Orthogonalise

    average, polar = EightBit(NesterovEma(0.95)), Orthogonalise("newton-schulz", 5, "match-rms")
    optimizer = chain(average, polar)(model, lr=1e-3)          # Muon's average in 8 bits

State is read, updated in full precision, and rounded again; what the transform returns comes from the numbers before
they were rounded. How numbers are rounded is in `fallline.kernels.eight_bit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ..contracts import Change
from ..kernels.eight_bit import BLOCK, dequantise, quantise
from .state import State
from .transform import Context, Transform

SMALLEST = 4096
"""Elements below which a tensor is not worth rounding, as in bitsandbytes."""


class EightBit(Transform):
    """A transform whose state tensors of the parameter's shape are kept as 8-bit codes with a scale for each block.

    A block is up to `block` neighbours in one row; more than two dimensions are seen as (first, all others). Numbers,
    single values, and tensors of fewer than two dimensions or `smallest` elements stay as they are. Codes and scales
    of a sharded parameter are sharded by rows, whatever its own placement, so that they do not depend on it.

    Args:
        inner: the transform. Of its state, what it declares in `nonnegative` has twice the codes.
        block: elements that share a scale.
        smallest: least elements of a tensor that is rounded.
    """

    def __init__(self, inner: Transform, block: int = BLOCK, smallest: int = SMALLEST) -> None:
        self.inner, self.block, self.smallest = inner, block, smallest
        self.acts_on = "row" if inner.acts_on == "element" else inner.acts_on
        self.scope, self.reduce, self.whole = inner.scope, inner.reduce, inner.whole

    def told(self) -> str:
        return f" of {type(self.inner).__name__.lower()}{self.inner.told()} (blocks of {self.block})"

    def init(self, param: Tensor) -> State:
        return self.packed(self.inner.init(param), param)

    def measure(self, g: Tensor, state: State, ctx: Context) -> dict[str, Tensor]:
        if type(self.inner).measure is Transform.measure:
            return {}
        full = self.unpacked(state, g)
        found = self.inner.measure(g, full, ctx)
        state.update(self.packed(full, g))
        return found

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        full = self.unpacked(state, u)
        out = self.inner.update(u, full, ctx)
        state.update(self.packed(full, u))
        return out

    def remap(self, state: State, change: Change) -> State | None:
        """As `inner` has it, rounded again. Blocks that stay as they were keep every code."""
        assert change.old is not None
        assert change.new is not None
        found = self.inner.remap(self.unpacked(state, change.old), change)
        return None if found is None else self.packed(found, change.new)

    def packed(self, state: Mapping[str, Any], like: Tensor) -> State:
        """State of `inner` as it is kept, for a parameter `like` this one."""

        def kept(name: str, value: Any) -> Any:
            if isinstance(value, Mapping):
                return self.packed(value, like)
            if not isinstance(value, Tensor) or value.shape != like.shape or not value.is_floating_point():
                return value
            if value.ndim < 2 or value.numel() < self.smallest:
                return value
            rows = by_rows(value)
            codes, scales = quantise(local(rows).flatten(1), self.signed(name), self.block)
            return {"codes": sharded(codes.view(local(rows).shape), rows), "scales": sharded(scales, rows)}

        return {name: kept(name, value) for name, value in state.items()}

    def unpacked(self, state: Mapping[str, Any], like: Tensor) -> State:
        """State of `inner` in full precision, for a parameter `like` this one."""

        def read(name: str, value: Any) -> Any:
            if not isinstance(value, Mapping):
                return value
            if value.keys() != {"codes", "scales"}:
                return self.unpacked(value, like)
            codes, scales = by_rows(value["codes"]), by_rows(value["scales"])
            x = dequantise(local(codes).flatten(1), local(scales), self.signed(name), self.block)
            rows = sharded(x.view(local(codes).shape), codes)
            if isinstance(rows, DTensor) and isinstance(like, DTensor):
                return rows.redistribute(placements=like.placements)
            return rows

        return {name: read(name, value) for name, value in state.items()}

    def signed(self, name: str) -> bool:
        """Whether a tensor of the state may be below zero: any may that `inner` does not rule out."""
        return name not in self.inner.nonnegative


def by_rows(x: Tensor) -> Tensor:
    """x, sharded by rows where it is sharded at all."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Shard(0) if at.is_shard() else at for at in x.placements])


def local(x: Tensor) -> Tensor:
    """What this rank has of x."""
    return x.to_local() if isinstance(x, DTensor) else x


def sharded(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which this rank has `part`, with as many rows in all as `like`, which is sharded by them."""
    if not isinstance(like, DTensor):
        return part
    shape = torch.Size((len(like), *part.shape[1:]))
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
