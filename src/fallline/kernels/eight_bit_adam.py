"""AdamW on moments in 8 bits, in one visit: read the codes, update moments and weights, and round the moments again.

Done plainly (reference: `fallline.optim.eight_bit.EightBit` around `fallline.optim.moments.Adam`) each part goes over
the whole matrix. Here a block of 256 is finished before the next is touched: 16 bytes of memory traffic per float32
parameter where AdamW alone has 28. On a CPU that is C, compiled at the first step; without a compiler, and on other
devices, it is tensor operations, on a CPU on slices that stay in the cache. They agree to rounding, not to the bit.

Legend: W [m, n]; each row has k = ⌈n/block⌉ blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from .adamw import adamw_step
from .eight_bit import SLICE, cells, codebook, dequantise, quantise, slices
from .native import compiled, in_parallel
from .slices import check_shapes

SHARE = 1 << 20
"""Elements of a matrix for one thread to update at a time."""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline int32_t bits(float x) { int32_t i; memcpy(&i, &x, 4); return i; }
static inline float number(int32_t i) { float x; memcpy(&x, &i, 4); return x; }

static void round_to_codes(const float *restrict x, long n, float scale, const uint32_t *restrict table,
                           uint32_t offset, uint32_t *restrict b, uint8_t *restrict codes) {
    float s = scale == 0 ? 1 : scale;
    for (long j = 0; j < n; j++) b[j] = (uint32_t)bits(x[j] / s) + offset;
    for (long j = 0; j < n; j++) codes[j] = (uint8_t)((table[b[j] >> 16] + b[j]) >> 16);
}

/* torch's: exact at both ends */
static inline float lerp(float a, float b, float weight) {
    return weight < 0.5f ? a + (b - a) * weight : b - (b - a) * (1 - weight);
}

/* Blocks of rows that lie one after another; buffer [3 block]. Order of integers is order of floats, NaN above all. */
void adamw_8bit(long rows, long n, long block, float *W, const float *G, uint8_t *MC, float *MS, uint8_t *VC, float *VS,
                const float *restrict signed_book, const float *restrict unsigned_book,
                const uint32_t *signed_cells, uint32_t offset, const uint32_t *unsigned_cells,
                float keep, float rate, float root, float eps, float w1, float b2, float w2, float *buffer) {
    float *restrict m = buffer, *restrict v = buffer + block;
    uint32_t *b = (uint32_t *)(buffer + 2 * block);
    for (long r = 0; r < rows; r++)
        for (long from = 0; from < n; from += block, MS++, VS++) {
            long length = n - from < block ? n - from : block, at = r * n + from;
            float *restrict w = W + at;
            const float *restrict g = G + at;
            const uint8_t *restrict mc = MC + at, *restrict vc = VC + at;
            float ms = *MS, vs = *VS;
            int32_t high = 0, low = 0, top = 0;
            for (long j = 0; j < length; j++) m[j] = signed_book[mc[j]];
            for (long j = 0; j < length; j++) v[j] = unsigned_book[vc[j]];
            for (long j = 0; j < length; j++) {
                float x = g[j], a = m[j] * ms, c = v[j] * vs;
                a = lerp(a, x, w1);
                c = c * b2 + x * w2 * x;
                w[j] = w[j] * keep - rate * a / (sqrtf(c) * root + eps);
                m[j] = a;
                v[j] = c;
                int32_t up = bits(a), down = bits(-a), size = bits(c) & 0x7FFFFFFF;
                high = up > high ? up : high;
                low = down > low ? down : low;
                top = size > top ? size : top;
            }
            *MS = low > high ? -number(low) : number(high);
            *VS = number(top);
            round_to_codes(m, length, *MS, signed_cells, offset, b, MC + at);
            round_to_codes(v, length, *VS, unsigned_cells, 0, b, VC + at);
        }
}
"""


@dataclass(frozen=True)
class Leaf:
    """One matrix and its moments.

    Attributes:
        p, g: [m, n], parameter and gradient.
        m_codes, v_codes: uint8 [m, n].
        m_scales, v_scales: [m, k] of the dtype of p.
    """

    p: Tensor
    g: Tensor
    m_codes: Tensor
    m_scales: Tensor
    v_codes: Tensor
    v_scales: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.p, self.g, self.m_codes, self.m_scales, self.v_codes, self.v_scales

    def parts(self, elements: int) -> Iterator[Leaf]:
        """Slices of rows of about so many elements on a CPU, the whole elsewhere."""
        for rows in slices(self.p, elements):
            yield Leaf(*(x[rows] for x in self.tensors()))


def eight_bit_adam_step(
    leaves: Sequence[Leaf],
    *,
    betas: tuple[float, float],
    eps: float,
    t: int,
    lr: float | Tensor,
    decay: float,
    block: int,
) -> None:
    """W ← (1 − η λ) W, then `torch.optim.Adam` at its update t, in place, with the moments before they are rounded.

    Args:
        leaves: matrices, changed in place.
        betas, eps, t: β₁, β₂, ε beside the corrected root, and t from 1.
        lr: η, a number or [].
        decay: λ.
        block: elements that share a scale.

    Raises:
        ValueError: shapes are not those of `Leaf`.
    """
    for leaf in leaves:
        m, n = leaf.p.shape
        check_shapes((m, n), leaf.g, leaf.m_codes, leaf.v_codes)
        check_shapes((m, -(-n // block)), leaf.m_scales, leaf.v_scales)
    fast = [leaf for leaf in leaves if suits_c(leaf)]
    library = compiled(SOURCE) if fast else None
    if library is not None:
        step = partial(c_step, library, betas=betas, eps=eps, t=t, lr=float(lr), decay=decay, block=block)
        in_parallel([step(part) for leaf in fast for part in leaf.parts(SHARE)])
    for leaf in leaves:
        if library is None or not suits_c(leaf):
            for part in leaf.parts(SLICE):
                tensor_step(part, betas=betas, eps=eps, t=t, lr=lr, decay=decay, block=block)


def suits_c(leaf: Leaf) -> bool:
    """Whether the C function, which checks nothing, may have this leaf, of the right shapes."""
    return (
        all(x.device.type == "cpu" and x.is_contiguous() for x in leaf.tensors())
        and all(x.dtype == torch.float32 for x in (leaf.p, leaf.g, leaf.m_scales, leaf.v_scales))
        and all(x.dtype == torch.uint8 for x in (leaf.m_codes, leaf.v_codes))
    )


def tensor_step(
    leaf: Leaf, *, betas: tuple[float, float], eps: float, t: int, lr: float | Tensor, decay: float, block: int
) -> None:
    """The step with tensor operations."""
    p = leaf.p.contiguous()
    M = dequantise(leaf.m_codes, leaf.m_scales, True, block)
    V = dequantise(leaf.v_codes, leaf.v_scales, False, block)
    adamw_step([p], [leaf.g.contiguous()], [M], [V], betas=betas, eps=eps, t=t, lr=lr, decay=decay)
    if p is not leaf.p:
        leaf.p.copy_(p)
    for old, new in zip((leaf.m_codes, leaf.m_scales), quantise(M, True, block), strict=True):
        old.copy_(new)
    for old, new in zip((leaf.v_codes, leaf.v_scales), quantise(V, False, block), strict=True):
        old.copy_(new)


def c_step(
    library: ctypes.CDLL,
    leaf: Leaf,
    *,
    betas: tuple[float, float],
    eps: float,
    t: int,
    lr: float,
    decay: float,
    block: int,
) -> Callable[[], object]:
    """The step in C, to be called once; for `suits_c`."""
    device = leaf.p.device
    signed, offset = cells(True, device)
    unsigned, _ = cells(False, device)
    books = codebook(True, device, torch.float32), codebook(False, device, torch.float32)
    numbers = (1 - lr * decay, lr / (1 - betas[0] ** t), 1 / sqrt(1 - betas[1] ** t), eps)
    weights = (1 - betas[0], betas[1], 1 - betas[1])
    buffer = torch.empty(3 * block)

    def call() -> None:
        library.adamw_8bit(
            *map(ctypes.c_long, (*leaf.p.shape, block)),
            *map(address, (*leaf.tensors(), *books, signed)),
            ctypes.c_uint32(offset),
            address(unsigned),
            *map(ctypes.c_float, (*numbers, *weights)),
            address(buffer),
        )

    return call


def address(x: Tensor) -> ctypes.c_void_p:
    """Where x begins in memory."""
    return ctypes.c_void_p(x.data_ptr())
