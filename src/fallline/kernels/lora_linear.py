"""A frozen linear layer and a low-rank one beside it, as one operation.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ

    ∂L/∂x = g W + s (g B) A,   ∂L/∂A = s (g B)ᵀ x,   ∂L/∂B = s gᵀ (x Aᵀ),   g = ∂L/∂y

W's own gradient [m, n] is never formed, and the low-rank part is added into the result of the large product instead of
going through buffers of its own. Saved for the backward: x, which layers with the same input share but for autocast,
and x Aᵀ.

Shapes: x [..., n], W [m, n], b [m], A [r, n], B [m, r], y [..., m].

Cost: 4 T n m + 6 T r (n + m) floating-point operations for T tokens, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..per_example import Use, watching


def lora_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """x Wᵀ + b + s (x Aᵀ) Bᵀ, for a weight and bias that are not trained.

    Args:
        x: [..., n]; all products run in its dtype, or in that of autocast.
        W: [m, n], of any strides. bias: [m]. They get no gradient.
        A: [r, n]. B: [m, r]. They may be wider than x; their gradients have their dtype.
        scale: s.

    Returns:
        [..., m], in the dtype of the products.
    """
    watch = watching()
    uses = (None, None) if watch is None else (watch.use(A), watch.use(B))
    if watch is not None and uses != (None, None):
        x = watch.rowwise(x, "a layer with an adapter")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W, bias = x.to(dtype), W.to(dtype), None if bias is None else bias.to(dtype)
    A, B = A.to(x.dtype), B.to(x.dtype)
    y: Tensor = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), W, bias, A, B, scale, uses)
    return y.view(*x.shape[:-1], len(W))


def lora_linear_plain(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The same, written out: the reference."""
    return torch.nn.functional.linear(x, W, bias) + scale * (x @ A.t()) @ B.t()


class _LoraLinear(torch.autograd.Function):
    """`lora_linear` on x [T, n]. Its backward is made of differentiable operations, so it has a second derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        uses: tuple[Use | None, Use | None],
    ) -> Tensor:
        y = x @ W.t() if bias is None else torch.addmm(bias, x, W.t())
        h = x @ A.t()
        y.addmm_(h, B.t(), alpha=scale)
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]  # what no gradient needs is not kept alive
        ctx.save_for_backward(x if need_a or need_b else None, W if need_x else None, A, B, h if need_b else None)
        ctx.scale, ctx.uses = scale, uses
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
        use_a, use_b = ctx.uses
        dx = dA = dB = None
        if need_x or need_a:
            gB = (g @ B) * ctx.scale
            if use_a is not None:
                use_a.outer(x, gB)
            elif need_a:
                dA = gB.t() @ x
            if need_x:
                dx = (g @ W).addmm_(gB, A)
        if use_b is not None:
            use_b.outer(h, g * ctx.scale)
        elif need_b:
            if torch.is_grad_enabled():  # to be differentiated again: h depends on x and A
                h = x @ A.t()
            dB = (g.t() @ h) * ctx.scale
        return dx, None, None, dA, dB, None, None
