"""A frozen linear layer and MiSS's change beside it, as one operation.

    s = fold(x),   s_c = Σ_j x_(j r + c)
    y = x Wᵀ + b + tile(s Bᵀ)

    ∂L/∂x = g W + spread(q B),   ∂L/∂B = qᵀ s,   q = fold(g),   g = ∂L/∂y

`tile` repeats a row until it is m long, `spread` until it is n long (its last turn cut short); without tiling B has m
rows and q is g. Saved for the backward: s, not x. The change is added into the results of the large products.

Shapes: x [..., n], W [m, n], b [m], B [k, r] with k | m, y [..., m].

Cost: 4 T n m + 6 T r k + 2 T n floating-point operations for T tokens, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..per_example import Use, watching


def fold(x: Tensor, r: int) -> Tensor:
    """Sums of every r-th number, [..., r] from [..., n]."""
    n = x.shape[-1]
    whole = n - n % r
    sums = x[..., :whole].unflatten(-1, (whole // r, r)).sum(-2)
    return sums if whole == n else sums + F.pad(x[..., whole:], (0, r - n % r))


def tile(y: Tensor, m: int) -> Tensor:
    """A row again and again, [..., m] from [..., k]."""
    k = y.shape[-1]
    return y if k == m else y.repeat(*[1] * (y.dim() - 1), m // k)


def fold_linear(x: Tensor, W: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    """x Wᵀ + b + tile(fold(x) Bᵀ), for a weight and bias that are not trained.

    Args:
        x: [..., n]; all products run in its dtype, or in that of autocast.
        W: [m, n], of any strides. bias: [m]. They get no gradient.
        B: [k, r]. It may be wider than x; its gradient has its dtype.

    Returns:
        [..., m], in the dtype of the products.
    """
    watch = watching()
    use = None if watch is None else watch.use(B)
    if watch is not None and use is not None:
        x = watch.rowwise(x, "a layer with an adapter")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W, bias = x.to(dtype), W.to(dtype), None if bias is None else bias.to(dtype)
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _FoldLinear.apply(flat, fold(flat, B.shape[1]), W, bias, B.to(x.dtype), use)
    return y.view(*x.shape[:-1], len(W))


def fold_linear_plain(x: Tensor, W: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
    """The same, written out: the reference."""
    return F.linear(x, W, bias) + tile(fold(x, B.shape[1]) @ B.t(), len(W))


class _FoldLinear(torch.autograd.Function):
    """`fold_linear` on x [T, n] and s = fold(x). What s passes on to x is in x's gradient, and s gets none; but as it
    comes from outside, a second derivative finds its way to x through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, W: Tensor, bias: Tensor | None, B: Tensor, use: Use | None) -> Tensor:
        m, k = len(W), len(B)
        y = x @ W.t() if bias is None else torch.addmm(bias, x, W.t())
        if k == m:
            y.addmm_(s, B.t())
        else:
            y.view(-1, m // k, k).add_((s @ B.t()).unsqueeze(1))
        need_x, need_b = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        ctx.save_for_backward(s if need_b else None, W if need_x else None, B)
        ctx.m, ctx.n, ctx.use = m, x.shape[1], use
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        s, W, B = ctx.saved_tensors
        k, r = B.shape
        q = g if k == ctx.m else g.reshape(-1, ctx.m // k, k).sum(1)
        dx = dB = None
        if ctx.needs_input_grad[0]:
            dx, ds = g @ W, q @ B
            whole = ctx.n - ctx.n % r
            dx[:, :whole].unflatten(1, (whole // r, r)).add_(ds.unsqueeze(1))
            if whole < ctx.n:
                dx[:, whole:].add_(ds[:, : ctx.n - whole])
        if ctx.use is not None:
            ctx.use.outer(s, q)
        elif ctx.needs_input_grad[4]:
            dB = q.t() @ s
        return dx, None, None, None, dB, None
