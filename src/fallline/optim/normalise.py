"""Transforms that fix the size of an update's rows or columns."""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from ..linalg import column_norms, norm, row_norms
from .state import State
from .transform import Context, Transform

SMALLEST = 1e-8
"""Least root mean square to divide by: rows of zeros stay zero."""


class UnitRms(Transform):
    """Unit root mean square along one axis of u, seen as [m, n]: more than two dimensions as (first, all others).

        row:     u_i ← u_i / max(√(mean_j u_ij²), 1e-8)        column:  u_j ← u_j / max(√(mean_i u_ij²), 1e-8)

    Args:
        axis: ``row``, one scale per output unit of a linear layer; ``column``, one per feature of an embedding.
    """

    acts_on = "row"

    def __init__(self, axis: Literal["row", "column"]) -> None:
        self.axis = axis

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        X = u.flatten(1)
        norms, n = (row_norms(X), X.shape[1]) if self.axis == "row" else (column_norms(X), X.shape[0])
        return (X / norms.div(sqrt(n)).clamp_(min=SMALLEST)).view_as(u)


class UnitSize(Transform):
    """Unit root mean square over all n elements: u ← u / max(‖u‖/√n, 1e-8)."""

    acts_on = "matrix"

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return u.div_(norm(u).div(sqrt(u.numel())).clamp_(min=SMALLEST))


class Standardise(Transform):
    """Zero mean and unit variance along the longer side of u, seen as [m, n]: more than two dimensions as (first, all
    others). With rows u_i of a wide or square u, and columns of a tall one:

        u_i ← (u_i − μ_i)/σ_i,   μ_i = mean_j u_ij,   σ_i² = mean_j (u_ij − μ_i)²

    What is constant but for rounding becomes zero.
    """

    acts_on = "row"
    whole = True  # a sharded mean less than whole would leave u a sum over ranks

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        X = u.flatten(1)
        dim = 1 if X.shape[1] >= X.shape[0] else 0
        mean = X.mean(dim=dim, keepdim=True)
        X = X - mean
        X -= X.mean(dim=dim, keepdim=True)  # the mean of thousands is not exact
        std = (row_norms(X) if dim else column_norms(X)) / sqrt(X.shape[dim])
        noise = 4 * torch.finfo(std.dtype).eps * mean.abs()
        return X.mul_(torch.where(std > noise, 1 / std, 0)).view_as(u)


class Sinkhorn(Transform):
    """Unit root mean square of rows, then of columns, in turn: u ← diag(p) u diag(q) for u seen as [m, n], more than
    two dimensions as (first, all others), with q = 1 before and `iterations` times

        p_i ← √n / max(‖(u diag(q))_i‖, 1e-8) for each row,   q_j ← √m / max(‖(diag(p) u)_j‖, 1e-8) for each column

    Afterwards columns have that size, and rows nearly. No row or column is scaled up by more than √n or √m times 1e8.

    Args:
        iterations: how often, from 1.
    """

    acts_on = "matrix"

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        X = u.flatten(1)
        m, n = X.shape
        scaled, p = X, X.new_ones(m, 1)
        for _ in range(self.iterations):
            p = sqrt(n) / row_norms(scaled).clamp(min=SMALLEST)
            q = sqrt(m) / column_norms(p * X).clamp(min=SMALLEST)
            scaled = X * q
        return (p * scaled).view_as(u)


class Sign(Transform):
    """u ← sign(u): the steepest direction of unit size in the largest element."""

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return u.sign_()


class Times(Transform):
    """u ← c u: a learning rate of its own beside the group's, which decay goes by.

    Args:
        factor: c.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return u.mul_(self.factor)
