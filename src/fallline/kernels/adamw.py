"""torch's fused AdamW on tensors that are no optimizer's own. Reference: `fallline.optim.moments.Adam`, corrected."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_step(
    p: list[Tensor],
    g: list[Tensor],
    M: list[Tensor],
    V: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    t: int,
    lr: float | Tensor,
    decay: float,
) -> None:
    """p ← (1 − η λ) p, then `torch.optim.Adam` at its update t, in place, at the speed of memory.

    Args:
        p, g, M, V: of equal shapes one by one, of one layout and without gaps: parameters, gradients and moments.
        betas, eps, t: β₁, β₂, ε beside the corrected root, and t from 1.
        lr: η, a number or [].
        decay: λ.
    """
    step = [torch.full((), t, dtype=torch.float32, device=x.device) for x in p]
    torch._fused_adamw_(
        p, g, M, V, [], step,
        lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
