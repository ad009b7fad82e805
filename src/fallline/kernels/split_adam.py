"""Adam for a part of a matrix and one step by the gradient, or its sign, for the rest.

Reference: the transforms of `fallline.optim.split`. Done plainly the rest is an intermediate of the size of the matrix,
written and read several times. Here the part is taken out, torch's fused AdamW updates it, the rest goes through a
buffer that stays in the cache, and the part is put back: of a fraction ρ, 12 + 16 ρ bytes of memory traffic per float32
parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .adamw import adamw_step
from .low_rank import add_product, long_norms
from .slices import check_shapes, slices

Remainder = Literal["sign", "sgd"]

ROUNDING = 32
"""What is left of a row beside a subspace counts as zero below so many rounding units of the row's norm."""

SLICE = 2 << 20
"""Bytes of a slice on a CPU: of parameter, gradient and buffer, which stay in the cache together."""


def column_adam_step(
    W: Tensor,
    g: Tensor,
    M: Tensor,
    V: Tensor,
    *,
    runs: Sequence[slice],
    betas: tuple[float, float],
    eps: float,
    t: int,
    remainder: Remainder,
    rate: float | Tensor,
    lr: float | Tensor,
    decay: float,
) -> None:
    """W ← (1 − η λ) W, then `torch.optim.Adam` at its update t for some columns, and −rate · sign(g) or −rate · g for
    all others, in place.

    Args:
        W, g: [m, n] of any strides, parameter and gradient.
        M, V: [m, k] without gaps, moments of the columns in the order of `runs`.
        runs: which columns, k in all.
        betas, eps, t: β₁, β₂, ε beside the corrected root, and t from 1.
        remainder: what the others take.
        rate, lr: numbers or []; η is `lr`.
        decay: λ.
    """
    m, n = W.shape
    check_shapes((m, sum(run.stop - run.start for run in runs)), M, V)
    size = max(1, SLICE // max(1, n * W.element_size())) if W.device.type == "cpu" else max(1, m)
    buffer = torch.empty_like(g[:size])
    for start in range(0, m, size):
        rows = slice(start, start + size)
        w, x = W[rows], g[rows]
        u = buffer[: len(w)]
        if remainder == "sign":
            torch.sign(x, out=u)
        else:
            u.copy_(x)
        for run in runs:
            u[:, run] = 0
        if decay:
            w.mul_(1 - lr * decay)
        subtract(w, u, rate)
        part, seen = (torch.cat([y[:, run] for run in runs], dim=1) for y in (w, x))
        adamw_step([part], [seen], [M[rows]], [V[rows]], betas=betas, eps=eps, t=t, lr=lr, decay=0.0)
        for run, found in zip(runs, part.split([run.stop - run.start for run in runs], dim=1), strict=True):
            w[:, run] = found


def entry_adam_step(
    W: Tensor,
    g: Tensor,
    M: Tensor,
    V: Tensor,
    *,
    where: Tensor,
    betas: tuple[float, float],
    eps: float,
    t: int,
    remainder: Remainder,
    rate: float | Tensor,
    lr: float | Tensor,
    decay: float,
) -> None:
    """As `column_adam_step`, for single entries.

    Args:
        W, g: [m, n] of any strides.
        M, V: [k].
        where: int64 [k], places of the entries in W, one row after another.
        betas, eps, t, remainder, rate, lr, decay: as there.
    """
    check_shapes(where.shape, M, V)
    part = W.take(where)
    adamw_step([part], [g.take(where)], [M], [V], betas=betas, eps=eps, t=t, lr=lr, decay=decay)
    rest_step(W, g, remainder=remainder, rate=rate, keep=1 - lr * decay if decay else None)
    W.put_(where, part)


def adam_slices(
    p: Tensor,
    g: Tensor,
    M: Tensor,
    V: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    t: int,
    lr: float | Tensor,
    decay: float,
) -> None:
    """p ← (1 − η λ) p, then `torch.optim.Adam` at its update t, in place; p, g, M, V of one shape and in any layout."""
    for w, m, v, x in slices((p, M, V), (g,), SLICE):
        adamw_step([w], [x], [m], [v], betas=betas, eps=eps, t=t, lr=lr, decay=decay)


def rest_step(W: Tensor, g: Tensor, *, remainder: Remainder, rate: float | Tensor, keep: float | Tensor | None) -> None:
    """W ← keep · W − rate · sign(g), or − rate · g, in place.

    Args:
        W, g: of one shape with at most two dimensions.
        remainder: which.
        rate: a number or [].
        keep: a number or [], or None for 1.
    """
    buffer: Tensor | None = None
    for w, x in slices((W,), (g,), SLICE):
        if keep is not None:
            w.mul_(keep)
        if remainder == "sign":
            buffer = torch.empty_like(w) if buffer is None else buffer
            subtract(w, torch.sign(x, out=buffer[: len(w)]), rate)
        else:
            subtract(w, x.clone() if isinstance(rate, Tensor) else x, rate)


def subtract(w: Tensor, u: Tensor, rate: float | Tensor) -> None:
    """w ← w − rate · u, in place; may overwrite u."""
    if isinstance(rate, Tensor):
        w.sub_(u.mul_(rate))
    else:
        w.sub_(u, alpha=rate)


def subspace_adam_step(
    W: Tensor,
    X: Tensor,
    P: Tensor,
    M: Tensor,
    V: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    t: int,
    remainder: Remainder,
    rate: float | Tensor,
    lr: float | Tensor,
    decay: float,
) -> None:
    """W ← (1 − η λ) W − η Adam(R) P − rate · sign(E), or − rate · E, in place, with R = X Pᵀ and E = X − R P.

    Args:
        W, X: [b, a] of any strides, parameter and gradient.
        P: [r, a], orthonormal rows.
        M, V: [b, r] without gaps, moments of R.
        betas, eps, t, remainder, rate, lr, decay: as for `column_adam_step`.
    """
    R = X @ P.t()
    check_shapes(R.shape, M, V)
    E = torch.addmm(X, R, P, alpha=-1, out=torch.empty_like(X))
    D = torch.zeros_like(R)
    adamw_step([D], [R], [M], [V], betas=betas, eps=eps, t=t, lr=lr, decay=0.0)
    add_product(W, D, P, lr, decay)
    if remainder == "sign":
        sign_beyond_rounding(E, long_norms(X))
    subtract(W, E, rate)


def sign_beyond_rounding(E: Tensor, norms: Tensor) -> Tensor:
    """E ← sign(E), 0 where |E_ij| < `ROUNDING` rounding units of ‖X_i‖, in place.

    Args:
        E: [b, a], what is left of X.
        norms: ‖X_i‖ [b, 1].
    """
    kind = torch.finfo(E.dtype)
    return E.div_((norms * (ROUNDING * kind.eps)).clamp_(min=kind.tiny)).trunc_().sign_()
