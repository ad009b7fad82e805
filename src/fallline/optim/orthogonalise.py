"""Transforms that fix the singular values of an update."""

from __future__ import annotations

from math import sqrt
from typing import Literal

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from ..polar import Preset, polar
from .state import State
from .transform import Context, Transform


class Orthogonalise(Transform):
    """u ← f(m, n) · polar(u), u = U Σ Vᵀ seen as [m, n]: more than two dimensions as (first, all others).

        original:   f = √max(1, m/n)
        match-rms:  f = 0.2 √max(m, n), so that the root mean square of u is near 0.2

    Args:
        preset, steps: as for `fallline.polar.polar`.
        scale: which f.
    """

    acts_on = "matrix"

    def __init__(self, preset: Preset, steps: int, scale: Literal["original", "match-rms"]) -> None:
        self.preset, self.steps, self.scale = preset, steps, scale

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        if not isinstance(u, DTensor):
            return self.direction(u.flatten(1)).reshape(u.shape)
        whole = self.direction(u.full_tensor().flatten(1)).reshape(u.shape)
        everywhere = [Replicate()] * u.device_mesh.ndim
        return DTensor.from_local(whole, u.device_mesh, everywhere).redistribute(placements=u.placements)

    def direction(self, X: Tensor) -> Tensor:
        """f · polar(X), X [..., m, n]."""
        m, n = X.shape[-2:]
        factor = sqrt(max(1, m / n)) if self.scale == "original" else 0.2 * sqrt(max(m, n))
        return polar(X, self.preset, self.steps).mul_(factor)
