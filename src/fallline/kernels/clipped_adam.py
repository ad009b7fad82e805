"""Adam on a gradient that is clipped and scaled as a whole: one visit to measure it, one to apply it.

Done plainly (reference: the transforms `AdaClip`, `AdaGN` and `Adam` of `fallline.optim`, one after another) each part
reads and writes the whole gradient. Here a slice of it is clipped and scaled into a buffer that stays in the cache, and
torch's fused AdamW goes on from there: 32 bytes of memory traffic per float32 parameter where AdamW alone has 28. On a
CPU only slices with something to clip are clipped and measured again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adamw import adamw_step

SLICE = 2 << 20
"""Bytes of a slice on a CPU: it and its buffer stay in the cache; smaller ones pay more calls than they save."""


def clipped_adam_step(
    p: Tensor,
    g: Tensor,
    M: Tensor,
    V: Tensor,
    *,
    limit: Callable[[Tensor], Tensor],
    factor: Callable[[Tensor], Tensor],
    betas: tuple[float, float],
    eps: float,
    t: int,
    lr: float | Tensor,
    decay: float,
) -> None:
    """p ← (1 − η λ) p, then `torch.optim.Adam` at its update t with the gradient c · clipped(g), in place.

    Args:
        p, g, M, V: of one shape with at most two dimensions and in any layout: parameter, gradient and moments.
        limit: max|g| [] → largest element there may be [], see `clipped`.
        factor: ‖clipped(g)‖ [] → c [].
        betas, eps, t: β₁, β₂, ε beside the corrected root, and t from 1.
        lr: η, a number or [].
        decay: λ.
    """
    if p.ndim == 2 and not p.is_contiguous():
        p, g, M, V = p.t(), g.t(), M.t(), V.t()
    updated = [x.contiguous() for x in (p, M, V)]
    weights, firsts, seconds, slices = (cut(x.view(-1)) for x in (*updated, g.contiguous()))

    peaks, squares = measured(slices)
    peak = peaks.amax()
    most = limit(peak)
    # to look at a result costs nothing on a CPU; elsewhere it would wait for the device
    over = (peaks > most).tolist() if g.device.type == "cpu" else [True] * len(slices)
    buffer = torch.empty_like(slices[0])
    for i, x in enumerate(slices):
        if over[i]:
            squares[i] = square(clipped(x, peak, most, buffer[: len(x)]))
    c = factor(squares.sum().sqrt())

    for i, x in enumerate(slices):
        here = buffer[: len(x)]
        scaled = torch.mul(clipped(x, peak, most, here) if over[i] else x, c, out=here)
        slice_of = ([weights[i]], [scaled], [firsts[i]], [seconds[i]])
        adamw_step(*slice_of, betas=betas, eps=eps, t=t, lr=lr, decay=decay)
    for x, new in zip((p, M, V), updated, strict=True):
        if new is not x:  # it has gaps in memory
            x.copy_(new)


def measured(slices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """max|x| and ‖x‖² of each slice x [n], both [slices]; a slice comes from the cache the second time."""
    ends: list[Tensor] = []
    squares: list[Tensor] = []
    for x in slices:
        ends += torch.aminmax(x)
        squares.append(square(x))
    return torch.stack(ends).abs_().view(-1, 2).amax(1), torch.stack(squares)


def square(x: Tensor) -> Tensor:
    """‖x‖² [] of x [n]."""
    return torch.dot(x, x)


def clipped(x: Tensor, peak: Tensor, limit: Tensor, out: Tensor) -> Tensor:
    """out ← x · limit/peak where |x| > limit, else x; all [n]. Those are few, which a CPU may know."""
    if x.device.type != "cpu":
        return torch.where(x.abs() > limit, x * (limit / peak), x)
    where = (torch.abs(x, out=out) > limit).nonzero().squeeze(1)
    out.copy_(x)
    out[where] = x[where] * (limit / peak)
    return out


def cut(x: Tensor) -> tuple[Tensor, ...]:
    """Slices of x [n] of `SLICE` bytes on a CPU, the whole elsewhere."""
    size = max(1, SLICE // x.element_size())
    return x.split(size) if x.device.type == "cpu" and len(x) > size else (x,)
