"""Transforms that hold a tensor's largest element, or its norm, to an average of what they were before."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..linalg import norm, row_norms, sum_dtype
from .state import State
from .transform import Context, Transform


class AdaClip(Transform):
    """Elements above an average of the largest are scaled down:

        m ← γ₃ m + (1 − γ₃) p,   m̂ = m/(1 − γ₃ᵗ),   u_i ← u_i · m̂/p  where |u_i| > m̂,   p = max|u|

    with t from 1. The largest lands on m̂ and others above m̂ land below it: order is kept among them, not across m̂.

    Args:
        gamma: γ₃; with 0 nothing is ever above.
    """

    acts_on = "matrix"

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def init(self, param: Tensor) -> State:
        return {"largest": scalar(param)}

    def limit(self, state: State, step: int, peak: Tensor) -> Tensor:
        """m̂ [] at this step, whose largest element is p []; updates m."""
        return ema(state["largest"], peak, self.gamma, step)

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        p = peak(u)
        limit = self.limit(state, ctx.step, p)
        return torch.where(u.abs() > limit, u * (limit / p), u)


class AdaGN(Transform):
    """The norm is replaced by its average, divided by the root of its average square:

        a ← γ₁ a + (1 − γ₁) ν,   b ← γ₂ b + (1 − γ₂) ν²,   u ← u/ν · â/(√b̂ + ε),   ν = ‖u‖

    with â = a/(1 − γ₁ᵗ), b̂ = b/(1 − γ₂ᵗ), t from 1. Zero stays zero.

    Args:
        gamma1, gamma2, eps: γ₁, γ₂ and ε.
    """

    acts_on = "matrix"

    def __init__(self, gamma1: float, gamma2: float, eps: float) -> None:
        self.gamma1, self.gamma2, self.eps = gamma1, gamma2, eps

    def init(self, param: Tensor) -> State:
        return {"norm": scalar(param), "norm_sq": scalar(param)}

    def factor(self, state: State, step: int, size: Tensor) -> Tensor:
        """â/(√b̂ + ε)/ν [] at this step, whose norm is ν [], 1 where that is zero; updates a and b."""
        mean = ema(state["norm"], size, self.gamma1, step)
        square = ema(state["norm_sq"], size.square(), self.gamma2, step)
        return torch.where(size == 0, 1, mean / (square.sqrt() + self.eps) / size)

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return u.mul_(self.factor(state, ctx.step, norm(u)))


class GrowthLimit(Transform):
    """The norm may grow by a factor γ in one update:

        c = max(‖u‖/(s + 1e-8), γ)/γ,   u ← u/c,   s ← ‖u‖/c

    with c = 1 while s, the norm after the last limit, is zero: at first, and after nothing but zeros.

    Args:
        gamma: γ.
    """

    acts_on = "matrix"
    whole = True

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def init(self, param: Tensor) -> State:
        return {"size": scalar(param)}

    def factor(self, state: State, size: Tensor) -> Tensor:
        """1/c [] for a u of this norm []; updates s."""
        s = state["size"]
        c = torch.where(s == 0, 1, (size / (s + 1e-8)).clamp(min=self.gamma) / self.gamma)
        s.copy_(size / c)
        return 1 / c

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return u.mul_(self.factor(state, norm(row_norms(u))))


def ema(average: Tensor, value: Tensor, beta: float, step: int) -> Tensor:
    """x ← β x + (1 − β) v in place, from x = 0; returns x/(1 − βᵗ), t = step + 1."""
    return average.lerp_(value.to(average.dtype), 1 - beta) / (1 - beta ** (step + 1))


def scalar(param: Tensor) -> Tensor:
    """An average of one number at its start, []."""
    return torch.zeros((), dtype=sum_dtype(param), device=param.device)


def peak(x: Tensor) -> Tensor:
    """max|x| over all elements, [], the same plain tensor on every rank."""
    found = x.abs().amax()
    return found.full_tensor() if isinstance(found, DTensor) else found
