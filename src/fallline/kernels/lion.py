"""Lion in one visit: 20 bytes of memory traffic per float32 parameter. Reference: `LionEma`, then `Sign`."""

from __future__ import annotations

import torch
from torch import Tensor

from .elementwise import Task, loops
from .slices import slices

SLICE = 1 << 20
"""Bytes of a slice on a CPU."""


def lion_step(
    p: Tensor, g: Tensor, M: Tensor, *, betas: tuple[float, float], lr: float | Tensor, decay: float
) -> list[Task]:
    """p ← (1 − η λ) p − η sign(β₁ M + (1 − β₁) g), then M ← β₂ M + (1 − β₂) g, in place.

    Args:
        p, g, M: of one shape with at most two dimensions: parameter, gradient and moment.
        betas: β₁ and β₂.
        lr: η, a number or [].
        decay: λ.

    Returns:
        What remains to be called for that, see `elementwise.loops`; nothing where it is done.
    """
    if p.device.type == "cpu":
        found = loops("lion", (p, g, M), (1 - betas[0], 1 - betas[1], float(lr), 1 - float(lr) * decay))
        if found is not None:
            return found
    buffer: Tensor | None = None
    for w, m, x in slices((p, M), (g,), SLICE):
        buffer = torch.empty_like(w) if buffer is None else buffer
        u = torch.lerp(m, x, 1 - betas[0], out=buffer[: len(w)]).sign_()
        if decay:
            w.mul_(1 - lr * decay)
        if isinstance(lr, Tensor):
            w.sub_(u.mul_(lr))
        else:
            w.sub_(u, alpha=lr)
        m.lerp_(x, 1 - betas[1])
    return []
