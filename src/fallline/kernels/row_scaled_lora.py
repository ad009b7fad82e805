"""A frozen linear layer and a low-rank one beside it, whose gradient by the change itself is scaled row by row.

    y = x Wᵀ + b + (x Aᵀ) Bᵀ

    ∂L/∂x = g W + (g B) A,   ∂L/∂A := (ḡ B)ᵀ x,   ∂L/∂B := ḡᵀ (x Aᵀ),   g = ∂L/∂y,   ḡ = g diag(c)

ḡᵀ x is diag(c) ∂L/∂(B A). What A and B are told is thus no gradient of L, and to differentiate it is refused.

Shapes: x [..., n], W [m, n], b [m], A [r, n], B [m, r], c [m], y [..., m].

Cost: as `lora_linear`, and one product of 2 T m r operations more in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..per_example import Use, watching


def row_scaled_lora(x: Tensor, W: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, c: Tensor | None) -> Tensor:
    """x Wᵀ + b + (x Aᵀ) Bᵀ, for a weight and bias that are not trained.

    Args:
        x: [..., n]; all products run in its dtype, or in that of autocast.
        W: [m, n], of any strides; None for the low-rank part alone. bias: [m]. They get no gradient.
        A: [r, n]. B: [m, r]. They may be wider than x; their gradients have their dtype.
        c: [m], a constant; None where no gradient will be asked for.

    Returns:
        [..., m], in the dtype of the products.

    Raises:
        InputError: in the backward, where the gradients are to be differentiated again.
    """
    watch = watching()
    uses = (None, None) if watch is None else (watch.use(A), watch.use(B))
    if watch is not None and uses != (None, None):
        x = watch.rowwise(x, "a layer with an adapter")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W, bias = x.to(dtype), None if W is None else W.to(dtype), None if bias is None else bias.to(dtype)
    A, B, c = A.to(x.dtype), B.to(x.dtype), None if c is None else c.to(x.dtype)
    y: Tensor = _RowScaledLora.apply(x.reshape(-1, x.shape[-1]), W, bias, A, B, c, uses)
    return y.view(*x.shape[:-1], len(B))


def row_scaled_lora_plain(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    """The same by forming B A: the reference. The last term is zero, and has the gradients of A and B."""
    change = B @ A
    fixed = change.detach()
    return F.linear(x, W, bias) + F.linear(x, fixed) + F.linear(x.detach(), c[:, None] * (change - fixed))


class _RowScaledLora(torch.autograd.Function):
    """`row_scaled_lora` on x [T, n]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        c: Tensor | None,
        uses: tuple[Use | None, Use | None],
    ) -> Tensor:
        h = x @ A.t()
        if W is None:
            y = h @ B.t()
        else:
            y = x @ W.t() if bias is None else torch.addmm(bias, x, W.t())
            y.addmm_(h, B.t())
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]  # what no gradient needs is not kept alive
        ctx.save_for_backward(
            x if need_a or need_b else None, W if need_x else None, A if need_x else None, B, c, h if need_b else None
        )
        ctx.uses = uses
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise InputError(
                "adapter 'allora' scales its gradients, which are then no gradients of the loss, so there is no second "
                "derivative; take lora"
            )
        x, W, A, B, c, h = ctx.saved_tensors
        need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
        use_a, use_b = ctx.uses
        dx = dA = dB = None
        if need_x:
            dx = (g @ B) @ A if W is None else (g @ W).addmm_(g @ B, A)
        if need_a or need_b:
            g = g * c
        if need_a and use_a is not None:
            use_a.outer(x, g @ B)
        elif need_a:
            dA = (g @ B).t() @ x
        if need_b and use_b is not None:
            use_b.outer(h, g)
        elif need_b:
            dB = g.t() @ h
        return dx, None, None, dA, dB, None, None
