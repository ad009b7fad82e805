"""A transform on a random part of the elements, so that its state is of that part only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.bits import draw, positions
from .state import State
from .transform import Context, Transform


class RandomEntries(Transform):
    """The inner transform on ⌊d n⌋ of the n elements, drawn at random, in order; u is 0 elsewhere.

    They are drawn at the first update and anew at every update T, 2 T, …, where the inner state must start afresh, as
    it was of other elements. Beside it one bit is kept for each of the n elements.

    Args:
        inner: a transform that acts on elements.
        density: d.
        every: T; 0 for never.
    """

    whole = True

    def __init__(self, inner: Transform, density: float, every: int) -> None:
        self.inner, self.density, self.every = inner, density, every

    def told(self) -> str:
        return f"{self.inner.told()} (density {self.density})"

    def init(self, param: Tensor) -> State:
        part = param.new_empty(int(self.density * param.numel()))
        mask = torch.zeros(-(-param.numel() // 8), dtype=torch.uint8, device=param.device)
        return {"inner": self.inner.init(part), "mask": mask, "drawn": 0}

    def chosen(self, state: State, ctx: Context) -> Tensor:
        """Where the elements are at this update, increasing [⌊d n⌋]; draws them if it is time to."""
        size = int(self.density * ctx.param.numel())
        if not state["drawn"] or (self.every and (ctx.step + 1) % self.every == 0):
            state["mask"].copy_(draw(ctx.param.numel(), size, ctx.rng("entries")))
            state["drawn"] = 1
        return positions(state["mask"], size)

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        where = self.chosen(state, ctx)
        return torch.zeros_like(u).put_(where, self.inner.update(u.take(where), state["inner"], ctx))
