"""Adam on a gradient clipped by the second moment, in one visit.

Done plainly (reference: `fallline.optim.adams.SpikeAdam`) the limit and the clipped gradient are intermediates of the
size of the parameter. Here it is a loop of C, or a slice of them stays in the cache and torch's fused AdamW goes on
from there: 28 bytes of memory traffic per float32 parameter, as AdamW. Of slices, a CPU only clips those that need it.
"""

from __future__ import annotations

from math import inf, sqrt

import torch
from torch import Tensor

from .adamw import adamw_step
from .elementwise import Task, loops
from .slices import slices

SLICE = 1 << 20
"""Bytes of a slice on a CPU."""


def spike_adam_step(
    p: Tensor,
    g: Tensor,
    M: Tensor,
    V: Tensor,
    *,
    threshold: float,
    betas: tuple[float, float],
    eps: float,
    t: int,
    lr: float | Tensor,
    decay: float,
) -> list[Task]:
    """p ← (1 − η λ) p − η Adam(x), x = g with elements above √(θ V) > 0 in size set to it, V before the update;
    in place.

    Args:
        p, g, M, V: of one shape with at most two dimensions: parameter, gradient and moments.
        threshold: θ; 0 for no clip.
        betas, eps, t: β₁, β₂, ε beside the uncorrected root, and t from 1.
        lr: η, a number or [].
        decay: λ.

    Returns:
        What remains to be called for that, see `elementwise.loops`; nothing where it is done.
    """
    root = sqrt(1 - betas[1] ** t)
    if p.device.type == "cpu":
        rate = float(lr) * root / (1 - betas[0] ** t)
        numbers = (1 - betas[0], betas[1], 1 - betas[1], eps, rate, 1 - float(lr) * decay, threshold or inf)
        found = loops("spike_adam", (p, g, M, V), numbers)
        if found is not None:
            return found
    buffers: tuple[Tensor, Tensor] | None = None
    for w, m, v, x in slices((p, M, V), (g,), SLICE):
        if threshold:
            buffers = (torch.empty_like(w), torch.empty_like(w)) if buffers is None else buffers
            x = clipped(x, v, threshold, *(buffer[: len(w)] for buffer in buffers))
        adamw_step([w], [x], [m], [v], betas=betas, eps=eps / root, t=t, lr=lr, decay=decay)
    return []


def clipped(x: Tensor, v: Tensor, threshold: float, limit: Tensor, out: Tensor) -> Tensor:
    """sign(x) min(|x|, √(θ v)), x where v = 0, for all [n]: x itself if a CPU finds nothing to clip, else `out`."""
    if x.device.type == "cpu" and torch.mul(x, x, out=out).sub_(v, alpha=threshold).amax() <= 0:
        return x
    torch.mul(v, threshold, out=limit).sqrt_().masked_fill_(v == 0, inf)
    torch.minimum(x, limit, out=out)
    return torch.maximum(out, limit.neg_(), out=out)
