"""Block-wise 8-bit numbers: a code for each element, and a scale for each block of a row.

A block is up to `block` neighbours in one row. Its scale s is its element of largest magnitude, sign included, so that
this one is always exact; x/s is rounded to float32 and then to the nearest of 256 numbers c, the dynamic codebook:

    x̂ = c[code] · s,    c:  0, 1 and the midpoints of the cells of [0.1, 1] · 10^(i − 6), i = 0 … 6, of equal width:
                            2^i cells with either sign for signed numbers, 2^(i+1) for those that are never negative

so that seven decades are kept, the largest numbers with two to three digits. A tie goes to the larger magnitude. Code 0
is zero. Without sign nothing but zero becomes zero, as what is never negative is often divided by. Rounding again what
was rounded once changes nothing.

The nearest code takes one look-up. The top 16 bits of a float32 name a cell between neighbours of 8 significant bits.
At most one boundary between codes lies in a cell, and the table's entry is such that adding the low 16 bits carries
into the code exactly from that boundary on.

Source: "8-bit Optimizers via Block-wise Quantization", 2021, where s is the largest magnitude, without its sign, blocks
go on from row to row, and small numbers become zero.

Legend: m rows, n columns, k = ⌈n/block⌉ blocks in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

BLOCK = 256

SLICE = 1 << 17
"""Elements to round at once on a CPU: they and their indices stay in the cache."""


def quantise(x: Tensor, signed: bool, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes and scales of x.

    Args:
        x: [m, n], float32 or float64.
        signed: whether there may be negative numbers; without, the others have twice the codes.
        block: elements that share a scale.

    Returns:
        codes uint8 [m, n], and scales [m, ⌈n/block⌉] of the dtype of x.
    """
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = x.new_empty(x.shape[0], -(-x.shape[1] // block))
    table, offset = cells(signed, x.device)
    for rows in slices(x):
        y = x[rows].clone(memory_format=torch.contiguous_format)
        for part, scale in blocks(y, scales[rows], block):
            scale.copy_(largest(part) if signed else part.amax(-1, keepdim=True))
            part.div_(scale.masked_fill(scale == 0, 1))
        bits = y.float().view(torch.int32).add_(offset).view(-1)
        found = torch.index_select(table, 0, (bits >> 16).bitwise_and_(0xFFFF).long()).add_(bits)
        codes[rows] = (found >> 16).view(y.shape)
    return codes, scales


def dequantise(codes: Tensor, scales: Tensor, signed: bool, block: int = BLOCK) -> Tensor:
    """The numbers x̂ [m, n] that codes [m, n] and scales [m, ⌈n/block⌉] stand for, of the dtype of the scales."""
    x = torch.empty(codes.shape, dtype=scales.dtype, device=codes.device)
    book = codebook(signed, codes.device, scales.dtype)
    for rows in slices(x):
        torch.index_select(book, 0, codes[rows].reshape(-1).long(), out=x[rows].view(-1))
        for part, scale in blocks(x[rows], scales[rows], block):
            part.mul_(scale)
    return x


def slices(x: Tensor, elements: int = SLICE) -> Iterator[slice]:
    """Slices of the rows of x [m, n]: of about so many elements on a CPU, all of them elsewhere."""
    m, n = x.shape
    size = max(1, elements // max(1, n)) if x.device.type == "cpu" else max(1, m)
    return (slice(start, start + size) for start in range(0, m, size))


def largest(x: Tensor) -> Tensor:
    """The element of largest magnitude along the last dimension, [..., 1]."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # aminmax is ten times slower on a CPU
    return torch.where(-low > high, low, high)


def blocks(x: Tensor, scales: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of x [m, n] and its scales [m, k], as far as there are any.

    First whole blocks, [m, n // block, block] and [m, n // block, 1]; then short ones, [m, 1, n % block] and [m, 1, 1].
    """
    n = x.shape[1]
    whole = n // block
    if whole:
        yield x[:, : whole * block].unflatten(1, (whole, block)), scales[:, :whole, None]
    if n % block:
        yield x[:, whole * block :].unsqueeze(1), scales[:, whole:, None]


def magnitudes(signed: bool) -> np.ndarray:
    """The codebook's numbers from 0 to 1, ascending, float64."""
    found = [0.0]
    for i in range(7):
        number = 2 ** (i if signed else i + 1)
        found += [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / number) for k in range(number)]
    return np.array([*found, 1.0])


@cache
def codebook(signed: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The numbers c by code, [256]: 0 and the positive ones, ascending; then the negative ones, by magnitude."""
    positive = torch.from_numpy(magnitudes(signed)).float()
    values = torch.cat([positive, -positive[1:-1]]) if signed else positive
    return values.to(dtype).to(device, non_blocking=True)


@cache
def cells(signed: bool, device: torch.device) -> tuple[Tensor, int]:
    """The table that finds the nearest code of a float32.

    Returns:
        table, int32 [65536], and an offset. With bits the number's own plus the offset, bits 16 to 23 of
        table[top 16 of bits] + bits are the code.
    """
    c = magnitudes(signed).astype(np.float32).astype(np.float64)
    middle = (c[1:] + c[:-1]) / 2  # exact: neighbours are within a factor of 16
    edge = middle.astype(np.float32)
    edge = np.where(edge < middle, np.nextafter(edge, np.float32(2)), edge).astype(np.float32)
    first = edge.view(np.int32).astype(np.int64)  # the bits of the least float32 of each code from the second on
    if not signed:
        first[0] = 1
    # code 129 begins where code 0 ends, which no carry can say: that boundary is moved to the edge of a cell
    offset = int(-first[0] % 65536) if signed else 0
    table = np.empty(65536, dtype=np.int64)
    for sign, edges in ((0, first + offset), (1, first[:-1] + offset if signed else first[:0])):
        start = np.arange(32768) << 16
        passed = np.searchsorted(edges, start, side="right")
        inside = np.searchsorted(edges, start + 65535, side="right") - passed
        assert inside.max() <= 1
        at = np.append(edges, 0)[passed] - start  # of the boundary inside, if there is one
        code = np.where(passed > 0, passed + 128 * sign, 0)
        index = np.arange(32768) + 32768 * sign
        table[index] = (code << 16) + np.where(inside, 65536 - at, 0) - (index << 16)
    return torch.from_numpy(table.astype(np.uint32).view(np.int32)).to(device, non_blocking=True), offset
