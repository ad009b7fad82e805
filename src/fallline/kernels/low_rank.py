"""Low-rank rules with little beside their thin products. Reference: the transforms of `fallline.optim.low_rank`.

X [b, a] is the gradient with its long side first, W the parameter turned likewise, both of any strides; P [r, a] the
basis, R = X Pᵀ [b, r], M and V [b, r] without gaps Adam's moments of R, N = M/(√V + ε) and c = √(1 − β₂ᵗ)/(1 − β₁ᵗ).

Done plainly, each of N P, R P, S and their sum is written and read once. Here torch's fused AdamW takes R to −c N in
one visit, a product adds to W what lies in the subspace, and what lies beside it is never formed: only its norm is
needed before W is, and that follows from norms of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .adamw import adamw_step
from .row_norm import column_norms

SMALL = 1e-8
"""Added to a norm of R that is divided by."""

ROUNDING = 1e-7
"""Share of a gradient that is not told from zero."""


def adam_direction(
    R: Tensor, M: Tensor, V: Tensor, *, betas: tuple[float, float], eps: float, t: int, lr: float | Tensor = 1.0
) -> Tensor:
    """−η c N [b, r]; updates M and V.

    Args:
        R, M, V: as above.
        betas, eps, t: β₁, β₂, ε beside the corrected root, and t from 1.
        lr: η, a number or [].
    """
    D = torch.zeros_like(R)
    adamw_step([D], [R], [M], [V], betas=betas, eps=eps, t=t, lr=lr, decay=0.0)
    return D


def add_product(W: Tensor, Z: Tensor, P: Tensor, lr: float | Tensor, decay: float, alpha: float = 1.0) -> None:
    """W ← (1 − η λ) W + α Z P, in place."""
    if isinstance(lr, Tensor):
        keep_part(W, lr, decay)
        W.addmm_(Z, P, alpha=alpha)
    else:
        W.addmm_(Z, P, beta=1 - lr * decay, alpha=alpha)


def keep_part(W: Tensor, lr: float | Tensor, decay: float) -> None:
    """W ← (1 − η λ) W, in place."""
    if decay:
        W.mul_(1 - lr * decay)


def residual_step(
    W: Tensor,
    X: Tensor,
    R: Tensor,
    P: Tensor,
    D: Tensor,
    *,
    alpha: float,
    kappa: float,
    correction: float,
    limit: Callable[[Tensor], Tensor],
    lr: float | Tensor,
    decay: float,
) -> None:
    """W ← (1 − η λ) W − η c (α N P + S/l), S_i = φ_i (X − κ R P)_i, φ_i = ‖N_i‖/(‖R_i‖ + 1e-8), in place.

    With orthonormal rows of P, ‖S‖² = Σ_i φ_i² (‖X_i‖² − (2κ − κ²) ‖R_i‖²), and the update is

        W ← (1 − η λ) W + η (α D + κ ψ R) P − η ψ X,   D = −c N,   ψ = c φ/l

    From κ = ½ on too many digits of that difference may cancel: X − κ R P is formed, which takes a third product.

    Args:
        W, X, R, P: as above.
        D: −c N, overwritten.
        alpha, kappa: α and κ.
        correction: c.
        limit: ‖S‖ [] → 1/l [].
        lr, decay: η and λ.
    """
    inside = torch.linalg.vector_norm(R, dim=1, keepdim=True)
    scale = torch.linalg.vector_norm(D, dim=1, keepdim=True).div_(inside + SMALL)
    rows = long_norms(X)
    if kappa < 0.5:
        left = rows.square_().addcmul_(inside, inside, value=kappa**2 - 2 * kappa).sqrt_()
        size = torch.linalg.vector_norm(left.mul_(scale))
    else:
        X = torch.addmm(X, R, P, alpha=-kappa)
        sizes = [torch.linalg.vector_norm(each.mul_(scale)) for each in (long_norms(X), rows)]
        size = torch.maximum(sizes[0], ROUNDING * sizes[1])
    scale.mul_(limit(size / correction)).mul_(lr)
    Z = D.mul_(lr * alpha)
    if kappa < 0.5:
        Z.addcmul_(R, scale, value=kappa)
    add_product(W, Z, P, lr, decay)
    W.addcmul_(X, scale, value=-1)


def scaled_step(
    W: Tensor,
    X: Tensor,
    R: Tensor,
    D: Tensor,
    *,
    per: Literal["row", "matrix"],
    factor: float,
    correction: float,
    limit: Callable[[Tensor], Tensor],
    lr: float | Tensor,
    decay: float,
) -> None:
    """W ← (1 − η λ) W − η f c φ∘X/l, in place, φ = ‖N‖/(‖R‖ + 1e-8) of rows or of the whole.

    Args:
        W, X, R: as above.
        D: −c N.
        per: one φ for each row, or one for all.
        factor, correction: f and c.
        limit: ‖φ∘X‖ [] → 1/l [].
        lr, decay: η and λ.
    """
    sizes = [torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (D, R)]
    if per == "matrix":
        sizes = [torch.linalg.vector_norm(x) for x in sizes]
    scale = sizes[0].div_(sizes[1] + SMALL)
    rows = long_norms(X) if per == "row" else torch.linalg.vector_norm(long_norms(X if X.is_contiguous() else X.t()))
    size = torch.linalg.vector_norm(rows.mul_(scale)) / correction
    scale.mul_(limit(size)).mul_(lr * factor)
    keep_part(W, lr, decay)
    W.addcmul_(X, scale, value=-1)


def long_norms(X: Tensor) -> Tensor:
    """‖X_i‖ of each row, [b, 1]; of a turned X, those of the columns of what is in memory."""
    if X.stride(0) < X.stride(1):
        return column_norms(X.t()).t()
    return torch.linalg.vector_norm(X, dim=1, keepdim=True)
