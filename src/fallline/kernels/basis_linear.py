"""A linear map by a fixed random basis with trained diagonals, without keeping it.

    Ã_(k b) j = s λ_kb A_kj γ_bj        [r·p, d], row k p + b
    down: y = x Ãᵀ,  [..., r·p] from [..., d]        up: y = x Ã,  the other way

    G = ∂L/∂Ã = gᵀ x, or xᵀ g;   ∂L/∂λ_kb = s Σ_j G_(k b) j A_kj γ_bj,   ∂L/∂γ_bj = s Σ_k G_(k b) j A_kj λ_kb

Ã, as large as a weight, is made in pieces of some rows in the forward and again in the backward, so is G. Saved for
the backward: x.

Shapes: λ [r, p], γ [p, d], A [r, d].

Cost: 6 T r p d floating-point operations for T tokens, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..per_example import Use, watching

PIECE = 1 << 22
"""Most numbers of Ã that are there at a time, where one k has no more."""


def basis(lam: Tensor, gam: Tensor, A: Tensor, scale: float) -> Tensor:
    """Ã [r·p, d], in the widest dtype of the three."""
    return ((scale * lam).unsqueeze(2) * A.unsqueeze(1) * gam).flatten(0, 1)


def basis_linear(x: Tensor, lam: Tensor, gam: Tensor, A: Tensor, scale: float, *, up: bool) -> Tensor:
    """x Ãᵀ, or with `up` x Ã.

    Args:
        x: [..., d], or [..., r·p]; the product runs in its dtype, or in that of autocast.
        lam: λ [r, p]. gam: γ [p, d]. They may be wider than x.
        A: [r, d], not trained, of any strides.
        scale: s.
        up: the direction.

    Returns:
        [..., r·p], or [..., d].
    """
    watch = watching()
    uses = (None, None) if watch is None else (watch.use(lam), watch.use(gam))
    if watch is not None and uses != (None, None):
        x = watch.rowwise(x, "a layer with an adapter")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _BasisLinear.apply(x.reshape(-1, x.shape[-1]), lam, gam, A, scale, up, uses)
    return y.view(*x.shape[:-1], y.shape[-1])


def basis_linear_plain(x: Tensor, lam: Tensor, gam: Tensor, A: Tensor, scale: float, *, up: bool) -> Tensor:
    """The same, written out: the reference."""
    made = basis(lam, gam, A, scale)
    return x @ made if up else x @ made.t()


def pieces(lam: Tensor, gam: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of λ and A, and those of Ã that come of them."""
    (r, p), d = lam.shape, gam.shape[1]
    step = max(1, PIECE // (p * d))
    for k in range(0, r, step):
        stop = min(k + step, r)
        yield slice(k, stop), slice(k * p, stop * p)


class _BasisLinear(torch.autograd.Function):
    """`basis_linear` of rows. Its backward is made of differentiable operations, so it has a second derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lam: Tensor,
        gam: Tensor,
        A: Tensor,
        scale: float,
        up: bool,
        uses: tuple[Use | None, Use | None],
    ) -> Tensor:
        trained = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if trained else None, lam, gam, A)
        ctx.scale, ctx.up, ctx.uses = scale, up, uses
        return product(x, lam, gam, A, scale, up)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, lam, gam, A = ctx.saved_tensors
        dx = d_lam = d_gam = None
        if ctx.needs_input_grad[0]:
            dx = product(g, lam, gam, A, ctx.scale, not ctx.up)
        use = next((use for use in ctx.uses if use is not None), None)
        if x is not None:
            left, right = (x, g) if ctx.up else (g, x)  # G = leftᵀ right
            if use is None:
                d_lam, d_gam = gradients(left, right, lam, gam, A, ctx.scale)
            else:  # each example's come from its own G
                ends = use.watch.layout.spans(len(x)).ends
                own = [gradients(left[a:b], right[a:b], lam, gam, A, ctx.scale) for a, b in ends]
                for i, (use, p) in enumerate(zip(ctx.uses, (lam, gam), strict=True)):
                    if use is not None:
                        use.whole(torch.stack([each[i] for each in own]) if own else p.new_zeros(0, *p.shape))
        return dx, d_lam, d_gam, None, None, None, None


def product(x: Tensor, lam: Tensor, gam: Tensor, A: Tensor, scale: float, up: bool) -> Tensor:
    """x Ã or x Ãᵀ, piece by piece."""
    found = []
    total: Tensor | None = None
    for ks, rows in pieces(lam, gam):
        made = basis(lam[ks], gam, A[ks], scale).to(x.dtype)
        if not up:
            found.append(x @ made.t())
        else:
            total = x[:, rows] @ made if total is None else total.addmm_(x[:, rows], made)
    return torch.cat(found, 1) if total is None else total


def gradients(left: Tensor, right: Tensor, lam: Tensor, gam: Tensor, A: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """∂L/∂λ and ∂L/∂γ from the factors of G = leftᵀ right, left [T, r·p], right [T, d]."""
    of_lam, of_gam = [], torch.zeros_like(gam)
    for ks, rows in pieces(lam, gam):
        G = (left[:, rows].t() @ right).unflatten(0, (-1, lam.shape[1]))  # [k, b, j]
        G = G.to(gam.dtype) * (scale * A[ks]).unsqueeze(1)
        of_lam.append((G * gam).sum(2))
        of_gam = of_gam + (G * lam[ks].unsqueeze(2)).sum(0)
    return torch.cat(of_lam), of_gam
