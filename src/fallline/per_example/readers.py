"""What can be read off the per-example gradients while a backward pass forms them.

A reader sees one parameter's gradients at a time, all examples', in blocks of rows; `Norms` may be handed its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from ..noise import rng
from .forms import squares, wide


class Reader(Protocol):
    """Anything with `begin` and `take`."""

    def begin(self, number: int, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        """Before a pass: B examples, and the parameters as matrices [m, n]."""

    def take(self, name: str, rows: slice, block: Tensor) -> None:
        """These rows of a parameter's gradients: block [B, r, n], not to be kept nor written to."""


class Norms:
    """Squared norms.

    Args:
        bound: rounding may lose the norm of a gradient that is small against the factors it is made of; then rather too
            large than too small, ordinarily by some 1e-5, so that what is clipped by it is clipped.

    Attributes:
        squared: parameter → [B], of the parameters that were used, in at least float32.
    """

    def __init__(self, bound: bool = False) -> None:
        self.bound = bound

    def begin(self, number: int, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self.squared: dict[str, Tensor] = {}
        self._none = torch.zeros(number, device=device)

    def take(self, name: str, rows: slice, block: Tensor) -> None:
        found = squares(block)
        self.squared[name] = self.squared[name] + found if name in self.squared else found

    def total(self, names: Sequence[str] | None = None) -> Tensor:
        """[B], squared norms over some parameters together; None: over all. One that was not used has gradient 0."""
        chosen = self.squared if names is None else [name for name in names if name in self.squared]
        return sum((self.squared[name] for name in chosen), self._none)


class Dots:
    """Inner products between all examples.

    Attributes:
        total: [B, B], in at least float32.
    """

    def begin(self, number: int, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self.total = torch.zeros(number, number, device=device)

    def take(self, name: str, rows: slice, block: Tensor) -> None:
        by_row = block.to(wide(block.dtype)).transpose(0, 1)
        self.total = self.total + torch.bmm(by_row, by_row.transpose(1, 2)).sum(0)


class Beside:
    """Inner products of examples 0 and 1, 2 and 3, …, such as the two answers of a pair.

    Attributes:
        total: [B / 2], in at least float32.
    """

    def begin(self, number: int, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self.total = torch.zeros(number // 2, device=device)

    def take(self, name: str, rows: slice, block: Tensor) -> None:
        both = block.unflatten(0, (-1, 2)).to(wide(block.dtype))
        self.total = self.total + (both[:, 0] * both[:, 1]).sum(2).sum(1)


class Along:
    """Inner products with a direction, such as the gradient on validation data.

    Args:
        direction: parameter → its shape. Parameters it lacks count nothing.

    Attributes:
        total: [B], in at least float32.
    """

    def __init__(self, direction: Mapping[str, Tensor]) -> None:
        self.direction = direction

    def begin(self, number: int, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        unknown = [name for name in self.direction if name not in shapes]
        if unknown:
            raise InputError(f"the direction has {unknown[0]!r}, which is no trained parameter")
        self._matrix = {}
        for name, v in self.direction.items():
            m, n = shapes[name]
            if v.numel() != m * n:
                raise InputError(f"the direction has {list(v.shape)} for {name!r}, which has {m * n} numbers")
            self._matrix[name] = v.reshape(m, n).to(device)
        self.total = torch.zeros(number, device=device)

    def take(self, name: str, rows: slice, block: Tensor) -> None:
        if name in self._matrix:
            along = self._matrix[name][rows]
            dtype = wide(torch.promote_types(block.dtype, along.dtype))
            self.total = self.total + (block.to(dtype) * along.to(dtype)).sum(2).sum(1)


class Sketch:
    """Random projections, whose inner products are those of the gradients in the mean over `seed`.

        s_b = Σ_p P_pᵀ g_b,p Q_p / √k,   entries of P_p [m, k₁], Q_p [n, k₂] ±1 at random, k = k₁ k₂

    Args:
        size: k. k₁ is the largest divisor of k not above √k.
        seed: of the projections, with the parameter's name.

    Attributes:
        total: [B, k], in at least float32. by_parameter: parameter → [B, k].
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise InputError(f"a sketch needs at least 1 number, got {size}")
        self.size, self.seed = size, seed
        self._left = max(k for k in range(1, size + 1) if size % k == 0 and k * k <= size)

    def begin(self, number: int, shapes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self.by_parameter: dict[str, Tensor] = {}
        self._shapes, self._device = shapes, device
        self._none = torch.zeros(number, self.size, device=device)
        self._signs: dict[str, tuple[Tensor, Tensor]] = {}

    def take(self, name: str, rows: slice, block: Tensor) -> None:
        if name not in self._signs:
            m, n = self._shapes[name]
            noise = rng(self.seed, 0, f"sketch/{name}")
            drawn = (torch.randint(0, 2, (d, k), generator=noise) for d, k in ((m, self._left), (n, self._right)))
            left, right = (2 * bits.to(self._device, wide(block.dtype)) - 1 for bits in drawn)
            self._signs[name] = left, right / self.size**0.5
        left, right = self._signs[name]
        found = (left[rows].t() @ (block.to(right.dtype) @ right)).flatten(1)
        self.by_parameter[name] = self.by_parameter[name] + found if name in self.by_parameter else found

    @property
    def _right(self) -> int:
        return self.size // self._left

    @property
    def total(self) -> Tensor:
        """[B, k], over all parameters."""
        return sum(self.by_parameter.values(), self._none)
