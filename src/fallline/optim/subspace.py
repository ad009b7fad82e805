"""The subspace in which low-rank rules keep what they remember: how a basis of it is found, and when anew.

A gradient of long side b and short side a is seen as X [b, a], turned where it is wide; more than two dimensions count
as (first, all others). With a basis P [r, a], r = min(rank, a):

    down   R = X Pᵀ   [b, r]             up   R P   [b, a]

| found by | P |
|---|---|
| `svd` | the leading right singular vectors of X, the largest entry of each positive |
| `iteration` | one step of block power iteration from the P before: the Q of Xᵀ (X Pᵀ) = Q T with T_ii > 0 |
| `gaussian` | N(0, 1)/√r, neither orthogonal nor dependent on X |

With X scaled to unit norm, `iteration` takes Xᵀ (X Pᵀ) + `KEPT` Pᵀ: where the gradient is zero or of lower rank, P
stays what it was. Its first P comes from a gaussian one after `STEPS` steps. Only `svd` waits for a GPU.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor

from ..linalg import sum_dtype
from .state import State
from .transform import Context

Finder = Literal["iteration", "svd", "gaussian"]

STEPS = 4
"""Power iterations from a random start: of what the best r directions hold of ‖X‖², the first P then holds 91 to 98 %
where X is noise (shapes from 512 × 512 to 2048 × 2048, r from a/32 to a/4), and 99.9 % where it is a Llama's gradient
(hidden size 512, r = 128)."""


KEPT = 1e-5
"""Share of ‖X‖² below which a direction counts as absent: well above rounding in float32."""


class Subspace:
    """A basis P for one parameter, found anew now and then.

    Args:
        rank: r, the short side where that is less.
        every: updates between two times that P is found.
        finder: how.
        spread: each parameter at updates of its own, so that not all are found in one; in the first, all are.
    """

    def __init__(self, rank: int, every: int, finder: Finder, *, spread: bool) -> None:
        self.rank, self.every, self.finder, self.spread = rank, every, finder, spread

    def init(self, param: Tensor) -> State:
        """No basis yet."""
        a, _ = sides(param)
        P = torch.zeros(min(self.rank, a), a, dtype=sum_dtype(param), device=param.device)
        return {"basis": P, "found": False}

    def due(self, state: State, ctx: Context) -> bool:
        """Whether P is found at this update."""
        turn = crc32(ctx.name.encode()) if self.spread else 0
        return not state["found"] or (ctx.step - turn) % self.every == 0

    def basis(self, X: Tensor, state: State, ctx: Context) -> Tensor:
        """P [r, a] for this update, whose gradient is X [b, a]; finite whatever X is."""
        P: Tensor = state["basis"]
        if self.due(state, ctx):
            P.copy_(self.find(X, P if state["found"] else None, ctx))
            state["found"] = True
        return P

    def find(self, X: Tensor, before: Tensor | None, ctx: Context) -> Tensor:
        """A basis [r, a] for X [b, a].

        Args:
            X: the gradient.
            before: the basis until now.
            ctx: what the random numbers depend on.
        """
        r, a = min(self.rank, X.shape[1]), X.shape[1]
        if self.finder == "svd":
            return leading(finite(X), r)
        if self.finder == "iteration" and before is not None:
            return iterated(finite(X), before, 1)
        normal = torch.randn(r, a, generator=ctx.rng("subspace"), device=X.device).to(X.dtype).div_(sqrt(r))
        return normal if self.finder == "gaussian" else iterated(finite(X), normal, STEPS)


def sides(param: Tensor) -> tuple[int, int]:
    """(a, b): short and long side of a parameter seen as a matrix."""
    m, n = param.shape[0], param.shape[1:].numel()
    return min(m, n), max(m, n)


def tall(G: Tensor) -> Tensor:
    """X [b, a]: a view of G [m, n] with the long side first, turned where m < n."""
    return G if G.shape[0] >= G.shape[1] else G.t()


def finite(X: Tensor) -> Tensor:
    """A copy of X, zero where it is not a number or infinite."""
    return X.nan_to_num(0.0, 0.0, 0.0)


def leading(X: Tensor, r: int) -> Tensor:
    """The r leading right singular vectors [r, a] of X [b, a], the entry of largest magnitude of each positive."""
    P = torch.linalg.svd(X, full_matrices=False).Vh[:r]
    return P * P.gather(1, P.abs().argmax(1, keepdim=True)).sign()


def iterated(X: Tensor, P: Tensor, steps: int) -> Tensor:
    """P [r, a] after so many block power iterations with Xᵀ X, X [b, a]: orthonormal rows, T_ii > 0. Where the squares
    of X are too small to count, so is X."""
    X = X / torch.linalg.vector_norm(X).clamp(min=sqrt(torch.finfo(X.dtype).tiny))
    for _ in range(steps):
        Y = (P @ X.t()) @ X
        Q, T = torch.linalg.qr(Y.add_(P, alpha=KEPT).t())
        P = torch.where(T.diagonal() < 0, -Q, Q).t()
    return P
