"""Elementwise work on several tensors, a slice at a time: a rule of many operations reads each from memory once.

A slice of every tensor and the buffers between them fit in the cache together: what one operation wrote, the next reads
from there. On other devices than a CPU the slice is the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def check_shapes(shape: Sequence[int], *tensors: Tensor) -> None:
    """Refuse tensors of another shape, before what checks nothing writes past their end.

    Raises:
        ValueError: there is one.
    """
    for x in tensors:
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"gradient and optimizer state must be of shape {[*shape]} here; got {[*x.shape]}")


def slices(written: Sequence[Tensor], read: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Slices of all tensors, those that are written first, alike in what elements they hold.

    Args:
        written, read: of one shape with at most two dimensions and one dtype, in any layout. Those that have gaps in
            memory or another order are copied; what was written is copied back at the end, so go through to it.
        size: bytes of a slice on a CPU.

    Yields:
        A slice [k] of each tensor.

    Raises:
        ValueError: they are of other shapes.
    """
    p = written[0]
    check_shapes(p.shape, *written, *read)
    if p.ndim == 2 and not p.is_contiguous():
        written, read = [x.t() for x in written], [x.t() for x in read]
    updated = [x.contiguous() for x in written]
    flat = [x.contiguous().view(-1) for x in (*updated, *read)]
    step = max(1, size // p.element_size()) if p.device.type == "cpu" else max(1, p.numel())
    for start in range(0, p.numel(), step):
        yield tuple(x[start : start + step] for x in flat)
    for x, new in zip(written, updated, strict=True):
        if new is not x:
            x.copy_(new)
