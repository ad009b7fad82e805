"""diffGrad in one visit: Adam whose step is scaled by how much the gradient changed.

Done plainly (reference: `fallline.optim.adams.FrictionAdam`) this reads and writes intermediates of the size of the
parameter. Here it is a loop of C, or torch's fused AdamW takes its step on a slice of zeros, which friction then
scales, all in the cache: 36 bytes of memory traffic per float32 parameter where AdamW alone has 28.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from .adamw import adamw_step
from .elementwise import Task, loops
from .slices import slices

SLICE = 1 << 20
"""Bytes of a slice on a CPU."""

MOST = 80.0
"""Changes above are no different: exp(−80) is nothing beside one."""


def friction_adam_step(
    p: Tensor,
    g: Tensor,
    M: Tensor,
    V: Tensor,
    previous: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    t: int,
    relative: bool,
    lr: float | Tensor,
    decay: float,
) -> list[Task]:
    """p ← (1 − η λ) p − η ξ · Adam(g), then previous ← g, in place; ξ as in `FrictionAdam`.

    Args:
        p, g, M, V, previous: of one shape with at most two dimensions: parameter, gradient, moments, gradient before.
        betas, eps, t: β₁, β₂, ε beside the uncorrected root, and t from 1.
        relative: whether the change is divided by the corrected root.
        lr: η, a number or [].
        decay: λ.

    Returns:
        What remains to be called for that, see `elementwise.loops`; nothing where it is done.
    """
    root = sqrt(1 - betas[1] ** t)
    if p.device.type == "cpu":
        rate = float(lr) * root / (1 - betas[0] ** t)
        name = "relative_friction_adam" if relative else "friction_adam"
        numbers = [1 - betas[0], betas[1], 1 - betas[1], eps, rate, 1 - float(lr) * decay, MOST]
        found = loops(name, (p, g, M, V, previous), [*numbers, root] if relative else numbers)
        if found is not None:
            return found
    buffer: Tensor | None = None
    for w, m, v, last, x in slices((p, M, V, previous), (g,), SLICE):
        buffer = torch.empty_like(w) if buffer is None else buffer
        step = buffer[: len(w)].zero_()
        adamw_step([step], [x], [m], [v], betas=betas, eps=eps / root, t=t, lr=lr, decay=0.0)
        change = last.sub_(x).abs_()
        if relative:
            change.div_(v.sqrt().add_(eps)).mul_(root)
        if decay:
            w.mul_(1 - lr * decay)
        w.addcmul_(step, change.sigmoid_())
        last.copy_(x)
    return []
