"""Transforms that fix the singular values of an update."""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from ..polar import SMALLEST, Preset, polar
from .state import State
from .transform import Context, Transform

Scale = Literal["original", "match-rms", "unit-rms", "keep-norm"]


class Orthogonalise(Transform):
    """u ← f(m, n) · polar(u), u = U Σ Vᵀ seen as [m, n]: more than two dimensions as (first, all others).

        original:   f = √max(1, m/n)
        match-rms:  f = 0.2 √max(m, n), so that the root mean square of u is near 0.2
        unit-rms:   f = √max(m, n), so that it is near 1
        keep-norm:  f = ‖u‖/‖polar(u)‖, so that the norm stays as it was

    Args:
        preset, steps: as for `fallline.polar.polar`.
        scale: which f.
    """

    acts_on = "matrix"
    whole = True

    def __init__(self, preset: Preset, steps: int, scale: Scale) -> None:
        self.preset, self.steps, self.scale = preset, steps, scale

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return self.direction(u.flatten(1)).reshape(u.shape)

    def direction(self, X: Tensor) -> Tensor:
        """f · polar(X), X [..., m, n]."""
        U = polar(X, self.preset, self.steps)
        if self.scale == "keep-norm":
            return U.mul_(sizes(X) / sizes(U).clamp_(min=SMALLEST))
        m, n = X.shape[-2:]
        factor = {"original": sqrt(max(1, m / n)), "match-rms": 0.2 * sqrt(max(m, n)), "unit-rms": sqrt(max(m, n))}
        return U.mul_(factor[self.scale])


def sizes(X: Tensor) -> Tensor:
    """‖X‖ of each matrix of X [..., m, n], [..., 1, 1]; by rows first, as float32 loses digits over millions."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(X, dim=-1, keepdim=True), dim=-2, keepdim=True)
