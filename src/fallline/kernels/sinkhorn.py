"""Sinkhorn's normalisation of rows and columns, applied: W ← (1 − η λ) W − η X with X = diag(u) G diag(v).

Done plainly (reference: `fallline.optim.normalise.Sinkhorn`) every half step reads and writes a matrix. Here G is
squared once, into a buffer that on a CPU stays in the cache; half a step is then the product of that matrix, or of its
transpose, with a vector, and only the last visit writes W. Where the buffer stays in the cache, all iterations together
move 12 bytes of memory traffic per float32 parameter.

Legend: m rows, n columns; S = G² by element; η learning rate, λ weight decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .row_norm import blocks


def sinkhorn_step(
    W: Tensor, G: Tensor, iterations: int, lr: float | Tensor, keep: float | Tensor | None, smallest: float
) -> None:
    """W ← keep · W − η diag(u) G diag(v), in place, with v = 1 before and `iterations` times

        u_i ← √n / max(√(Σ_j G_ij² v_j²), smallest),   v_j ← √m / max(√(Σ_i G_ij² u_i²), smallest)

    Args:
        W, G: [m, n], parameter and gradient.
        iterations: how often, from 1.
        lr: η, a number or []; a tensor is not read on the host.
        keep: 1 − η λ, a number or [], or None for no weight decay.
        smallest: least norm to divide by.
    """
    S = G * G
    u, v = scales(S, iterations, smallest)
    u.mul_(lr)
    for rows in blocks(W):
        w, g, scaled, left = (W, G, S, u) if rows is None else (W[rows], G[rows], S[rows], u[rows])
        if keep is not None:
            w.mul_(keep)
        w.addcmul_(torch.mul(g, v, out=scaled), left, value=-1)


def scales(S: Tensor, iterations: int, smallest: float) -> tuple[Tensor, Tensor]:
    """u [m, 1] and v [n] of `sinkhorn_step`, of S = G² [m, n]."""
    m, n = S.shape
    rows, columns = S.new_empty(m), S.new_ones(n)  # u² and v²
    for _ in range(iterations):
        torch.mv(S, columns, out=rows).clamp_(min=smallest**2).reciprocal_().mul_(n)
        torch.mv(S.t(), rows, out=columns).clamp_(min=smallest**2).reciprocal_().mul_(m)
    return rows.sqrt_().unsqueeze(1), columns.sqrt_()
