"""Adam changed in one place: its step held back where gradients are steady; its gradient clipped where they spike."""

from __future__ import annotations

from math import cos, inf, pi, sqrt

import torch
from torch import Tensor

from .moments import Adam, zeros
from .state import State
from .transform import Context


class FrictionAdam(Adam):
    """Adam's step, less of it where the gradient changes little:

        u ← ξ · Adam(u),   ξ = 1/(1 + exp(−|u′ − u|)),   or relative:  |u′ − u|/(√V + ε) · √(1 − β₂ᵗ) in the exponent

    element by element, with u′ what u was at the update before, 0 at first. So ½ ≤ ξ < 1.

    Args:
        betas, eps: β₁, β₂ and ε, which is beside the uncorrected root.
        relative: the change is divided by the corrected root, V after this update, so that its scale does not matter.
    """

    def __init__(self, betas: tuple[float, float], eps: float, *, relative: bool) -> None:
        super().__init__(betas, eps)
        self.relative = relative

    def init(self, param: Tensor) -> State:
        return super().init(param) | {"previous": zeros(param)}

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        change = (state["previous"] - u).abs_()
        state["previous"].copy_(u)
        u = super().update(u, state, ctx)
        if self.relative:
            root = sqrt(1 - self.betas[1] ** self.age(ctx.step))
            change.div_(state["exp_avg_sq"].sqrt().add_(self.eps)).mul_(root)
        return u.mul_(change.sigmoid_())


class SpikeAdam(Adam):
    """Adam whose gradient is clipped by the second moment as it was, and whose moments start afresh now and then:

        u ← s · Adam(clip(u)),   clip(u) = sign(u) min(|u|, √(θ V)) where V > 0, else u

    At every update ΔT, 2 ΔT, … the moments are zero before they are used, and k is 0; it is the number of updates since
    then. Nothing is clipped while V is still small, at k < `clip_after`, where k counts from 1 before the first reset;
    nor where it is 0, as of elements that had no gradient yet.
    From a reset on s = 1 − 0.99 · ½ (1 + cos(π k/(K + 1))) for k < K, else 1.

    Args:
        betas, eps: β₁, β₂ and ε, which is beside the uncorrected root.
        threshold: θ; 0 for no clip.
        clip_after: see above.
        reset_every: ΔT; 0 for never.
        reset_step: a reset makes t 1 again, too.
        rewarm: K.
    """

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        *,
        threshold: float,
        clip_after: int,
        reset_every: int,
        reset_step: bool,
        rewarm: int,
    ) -> None:
        super().__init__(betas, eps, reset_every=reset_every)
        self.threshold, self.clip_after, self.reset_step, self.warm = threshold, clip_after, reset_step, rewarm

    def since(self, step: int) -> int:
        """k."""
        return (step + 1) % self.reset_every if self.reset_every else step + 1

    def resets(self, step: int) -> bool:
        """Whether this update begins with a reset."""
        return self.since(step) == 0

    def age(self, step: int) -> int:
        return super().age(step) if self.reset_step else step + 1

    def reset(self, state: State, step: int) -> None:
        if self.resets(step):
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()

    def limit(self, step: int) -> float:
        """θ at this update, 0 where nothing is clipped."""
        return self.threshold if self.since(step) >= self.clip_after else 0.0

    def share(self, step: int) -> float:
        """s."""
        k = self.since(step)
        if not self.reset_every or step + 1 < self.reset_every or k >= self.warm:
            return 1.0
        return 1 - 0.99 * (1 + cos(pi * k / (self.warm + 1))) / 2

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        threshold = self.limit(ctx.step)
        if threshold:
            V = state["exp_avg_sq"]
            limit = V.mul(threshold).sqrt_().masked_fill_(V == 0, inf).to(u.dtype)
            u = torch.maximum(torch.minimum(u, limit), -limit)
        return super().update(u, state, ctx).mul_(self.share(ctx.step))
