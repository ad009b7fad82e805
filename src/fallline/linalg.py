"""Reductions that are right for sharded parameters too.

A method that looks at more than single elements takes its norms from here. For a DTensor the partial sums of the
shards are added over ranks before anything uses them; half precision is summed in float32.

Shapes: x is [m, …], seen as m rows of n elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

LARGE = 1 << 16
"""Elements from which `norms` takes a tensor row by row."""


def norm(x: Tensor) -> Tensor:
    """‖x‖₂ over all elements, [], the same plain tensor on every rank."""
    found = torch.linalg.vector_norm(x, dtype=sum_dtype(x))
    return found.full_tensor() if isinstance(found, DTensor) else found


def norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """‖x‖₂ of each tensor, [len(tensors)], added up in `dtype`.

    Large ones go row by row: of millions of numbers at once, float32 loses the third digit on CPU.
    """
    rows = [torch.linalg.vector_norm(x, dim=-1, dtype=dtype) if x.numel() > LARGE else x for x in tensors]
    return torch.stack(torch._foreach_norm(rows, 2, dtype))


def row_norms(x: Tensor) -> Tensor:
    """‖x_i‖₂ of each row, [m, 1]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, keepdim=True, dtype=sum_dtype(x))


def column_norms(x: Tensor) -> Tensor:
    """‖x_j‖₂ of each column over the rows, [1, …]."""
    return torch.linalg.vector_norm(x, dim=0, keepdim=True, dtype=sum_dtype(x))


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype to add up in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
