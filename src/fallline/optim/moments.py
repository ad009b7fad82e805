"""Transforms that remember gradients: an average, and Adam's two."""

from __future__ import annotations

from itertools import groupby
from math import sqrt

import torch
from torch import Tensor

from ..kernels.adam import adam_step
from ..kernels.adamw import adamw_step
from ..linalg import sum_dtype
from .state import State
from .transform import Context, Members, Transform


def zeros(param: Tensor) -> Tensor:
    """A moment at its start: zero, in the parameter's shape, at least float32."""
    return torch.zeros_like(param, dtype=sum_dtype(param), requires_grad=False)


class Ema(Transform):
    """B ← β B + (1 − β) u from B = 0, without bias correction; u ← B."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def init(self, param: Tensor) -> State:
        return {"average": zeros(param)}

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return u.copy_(state["average"].lerp_(u.to(state["average"].dtype), 1 - self.beta))


class NesterovEma(Ema):
    """B ← β B + (1 − β) u from B = 0, without bias correction; u ← β B + (1 − β) u, as B would be if u came again."""

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        B = state["average"].lerp_(u.to(state["average"].dtype), 1 - self.beta)
        return u.lerp_(B.to(u.dtype), self.beta)


class LionEma(Ema):
    """u ← β₁ B + (1 − β₁) u, then B ← β₂ B + (1 − β₂) u with the u that came; B = 0 before.

    Args:
        betas: β₁ and β₂.
    """

    def __init__(self, betas: tuple[float, float]) -> None:
        super().__init__(betas[1])
        self.betas = betas

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        B = state["average"]
        came = u.to(B.dtype)
        mixed = B.lerp(came, 1 - self.betas[0])
        B.lerp_(came, 1 - self.beta)
        return u.copy_(mixed)


class Adam(Transform):
    """Adam:

        M ← β₁ M + (1 − β₁) u,   V ← β₂ V + (1 − β₂) u²,   u ← M/(√V + ε) · √(1 − β₂ᵗ)/(1 − β₁ᵗ)

    with t from 1 and ε beside the uncorrected root, as 🤗's AdamW had it. `torch.optim.Adam` adds ε to √(V/(1 − β₂ᵗ)):
    a difference in the first steps and for tiny gradients.

    Args:
        betas, eps: β₁, β₂ and ε.
        corrected: ε as in `torch.optim.Adam`.
        reset_every: every so many updates both moments are zero and t is 1 again before they are used; 0 for never.
    """

    nonnegative = frozenset({"exp_avg_sq"})

    def __init__(
        self, betas: tuple[float, float], eps: float, *, corrected: bool = False, reset_every: int = 0
    ) -> None:
        self.betas, self.eps, self.corrected, self.reset_every = betas, eps, corrected, reset_every

    def init(self, param: Tensor) -> State:
        return {"exp_avg": zeros(param), "exp_avg_sq": zeros(param)}

    def age(self, step: int) -> int:
        """t: 1 at the first update and at each reset, the first of which is update `reset_every`."""
        update = step + 1
        return update if not self.reset_every or update < self.reset_every else update % self.reset_every + 1

    def reset(self, state: State, step: int) -> None:
        """Zero the moments if it is time to."""
        if self.reset_every and self.age(step) == 1:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()

    def correction(self, step: int) -> float:
        """√(1 − β₂ᵗ)/(1 − β₁ᵗ)."""
        t = self.age(step)
        return sqrt(1 - self.betas[1] ** t) / (1 - self.betas[0] ** t)

    def added(self, step: int) -> float:
        """What is added to the uncorrected root: ε, or where that goes beside the corrected one, √(1 − β₂ᵗ) ε."""
        return self.eps * sqrt(1 - self.betas[1] ** self.age(step)) if self.corrected else self.eps

    def added_corrected(self, step: int) -> float:
        """What is added to the corrected root √(V/(1 − β₂ᵗ)): ε, or where that goes beside V's own, ε/√(1 − β₂ᵗ)."""
        return self.eps if self.corrected else self.eps / sqrt(1 - self.betas[1] ** self.age(step))

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return self.direction(u, state, ctx.step).mul_(self.correction(ctx.step))

    def direction(self, u: Tensor, state: State, step: int) -> Tensor:
        """u ← M/(√V + ε), without √(1 − β₂ᵗ)/(1 − β₁ᵗ)."""
        M, V = state["exp_avg"], state["exp_avg_sq"]
        self.reset(state, step)
        M.lerp_(u, 1 - self.betas[0])
        V.mul_(self.betas[1]).addcmul_(u, u, value=1 - self.betas[1])
        return torch.div(M, V.sqrt().add_(self.added(step)), out=u)

    def fused(self, members: Members, lr: float | Tensor, decay: float) -> None:
        """This transform as a whole rule, for many parameters at once."""

        def kind(member: tuple[Context, State]) -> tuple[int, bool]:
            ctx, _ = member
            return ctx.step, plain_layout(ctx.param, ctx.grad)

        for (step, torchs_own), same in groupby(sorted(members, key=kind), key=kind):
            contexts, states = zip(*same, strict=True)
            p, g = [ctx.param for ctx in contexts], [ctx.grad for ctx in contexts]
            for state in states:
                self.reset(state["adam"], step)
            M, V = ([state["adam"][name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            if torchs_own:
                eps = self.added_corrected(step)
                adamw_step(p, g, M, V, betas=self.betas, eps=eps, t=self.age(step), lr=lr, decay=decay)
            else:
                rate, keep = lr * self.correction(step), 1 - lr * decay if decay else None
                adam_step(p, g, M, V, betas=self.betas, eps=self.added(step), rate=rate, keep=keep)


def plain_layout(*tensors: Tensor) -> bool:
    """Whether all have the usual order of elements in memory, which torch's fused kernels take for granted."""
    return all(x.is_contiguous() for x in tensors)
