"""A linear layer whose frozen weight is changed block by block, without keeping the changed weight.

    W'_ij = W_ij + W_ij D_i + D_i,   blocks [r, r]: i counts them down, j across
    y = x W'ᵀ + b

    ∂L/∂x = g W',   ∂L/∂D_i = Σ_j (W_ij + I)ᵀ G_ij,   G = gᵀ x,   g = ∂L/∂y

W' [m, n] is made in the forward and again in the backward, and not kept between them. Saved for the backward: x, which
layers with the same input share but for autocast.

Shapes: x [..., n], W [m, n], b [m], D [m/r, r, r], y [..., m].

Cost: 6 T n m + 6 m n r floating-point operations for T tokens, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..per_example import Use, watching


def changed(W: Tensor, D: Tensor, whole: bool) -> Tensor:
    """W' [m, n], or without `whole` W' − W, in the wider dtype of W and D."""
    (m, n), (i, r, _) = W.shape, D.shape
    dtype = torch.promote_types(W.dtype, D.dtype)
    rows = W.to(dtype).reshape(i, r * (n // r), r)  # [i, (row in block, j), column in block]
    made = torch.baddbmm(rows, rows, D.to(dtype), beta=int(whole))
    return (made.view(i, r, n // r, r) + D.to(dtype).unsqueeze(2)).view(m, n)


def gradient(W: Tensor, r: int, G: Tensor) -> Tensor:
    """∂L/∂D [m/r, r, r] from W' 's gradient [m, n]."""
    m, n = W.shape
    i, j = m // r, n // r
    G = G.to(torch.promote_types(W.dtype, torch.float32))
    rows = W.to(G.dtype).reshape(i, r * j, r)
    return torch.baddbmm(G.reshape(i, r, j, r).sum(2), rows.transpose(1, 2), G.reshape(i, r * j, r))


def block_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    D: Tensor,
    whole: bool = True,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """x W'ᵀ + b, for a weight and bias that are not trained.

    Args:
        x: [..., n]; the product runs in its dtype, or in that of autocast.
        W: [m, n], of any strides. bias: [m]. They get no gradient.
        D: [m/r, r, r], r dividing m and n. W' is made in the wider dtype of W and D.
        whole: with W itself; otherwise W' − W is meant by W'.
        again: makes W anew, which then is not kept for the backward.

    Returns:
        [..., m], in the dtype of the product.
    """
    watch = watching()
    use = None if watch is None else watch.use(D)
    if watch is not None and use is not None:
        x = watch.rowwise(x, "a layer with an adapter")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = _BlockLinear.apply(x.reshape(-1, x.shape[-1]), W, bias, D, whole, again, use)
    return y.view(*x.shape[:-1], len(W))


def block_linear_plain(x: Tensor, W: Tensor, bias: Tensor | None, D: Tensor, whole: bool = True) -> Tensor:
    """The same, block by block: the reference."""
    r = D.shape[1]
    rows = []
    for i, own in enumerate(D):
        blocks = W[i * r : (i + 1) * r].split(r, 1)
        rows.append(torch.cat([whole * block + block @ own + own for block in blocks], 1))
    return F.linear(x, torch.cat(rows), bias)


class _BlockLinear(torch.autograd.Function):
    """`block_linear` on x [T, n]. Its backward is made of differentiable operations, so it has a second derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        D: Tensor,
        whole: bool,
        again: Callable[[], Tensor] | None,
        use: Use | None,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, W if again is None else None, D)
        ctx.whole, ctx.again, ctx.use = whole, again, use
        return F.linear(x, changed(W, D, whole).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, D = ctx.saved_tensors
        W = W if ctx.again is None else ctx.again()
        r = D.shape[1]
        dx = dD = None
        if ctx.needs_input_grad[0]:
            dx = g @ changed(W, D, ctx.whole).to(g.dtype)
        if ctx.use is not None:  # D's gradient comes from the product, so each example's has its own
            ends = ctx.use.watch.layout.spans(len(x)).ends
            own = [gradient(W, r, g[a:b].t() @ x[a:b]).flatten(1) for a, b in ends]
            ctx.use.whole(torch.stack(own) if own else D.new_zeros(0, len(D), r * r))
        elif ctx.needs_input_grad[3]:
            dD = gradient(W, r, g.t() @ x)
        return dx, None, None, dD, None, None, None
