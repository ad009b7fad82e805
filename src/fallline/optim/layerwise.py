"""Transforms that give each layer a learning rate of its own, by how noisy its gradient is beside the others'."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from torch import Tensor

from ..linalg import norm
from ..polar import Preset, polar
from .clipping import scalar
from .moments import zeros
from .state import State
from .transform import Context, Transform


class Decay(Transform):
    """u ← u + λ W: weight decay at the rate of what comes after it, where the chain's own has the group's.

    Args:
        weight_decay: λ.
    """

    def __init__(self, weight_decay: float) -> None:
        self.weight_decay = weight_decay

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return u.add_(ctx.param.to(u.dtype), alpha=self.weight_decay) if self.weight_decay else u


class LayerRate(Transform):
    """The noisier a layer's gradient, the smaller its step:

        H ← β H + (1 − β) ‖G − G'‖²,   a = α/√(α² + H),   u ← u √(a/max a)

    from H = 0, with G' the gradient before and the largest a of all layers that share the chain and have a gradient.
    The first update has no G' and leaves H at zero.

    Args:
        alpha: α, in units of ‖G‖.
        beta: β.
        size: ‖ ‖, G of any shape → []; the dual of the norm in which a step has unit size.
    """

    acts_on = "group"
    scope = "group"
    reduce = "max"
    whole = True

    def __init__(self, alpha: float, beta: float, size: Callable[[Tensor], Tensor]) -> None:
        self.alpha, self.beta, self.size = alpha, beta, size

    def init(self, param: Tensor) -> State:
        return {"previous": zeros(param), "noise": scalar(param)}

    def measure(self, g: Tensor, state: State, ctx: Context) -> dict[str, Tensor]:
        before = state["previous"]
        if ctx.step:
            state["noise"].lerp_(self.size(before.neg_().add_(g)).square(), 1 - self.beta)
        before.copy_(g)
        return {"share": self.share(state)}

    def share(self, state: State) -> Tensor:
        """a []."""
        return (1 + state["noise"] / self.alpha**2).rsqrt()

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        return u.mul_((self.share(state) / ctx.measured["share"]).sqrt())


def absolute_sum(D: Tensor) -> Tensor:
    """Σ |D|, []: the dual of the largest element, in which sign(B) has size 1."""
    return D.abs().sum()


def scaled_norm(D: Tensor) -> Tensor:
    """√n ‖D‖₂ of n elements, []: the dual of the root mean square."""
    return norm(D) * sqrt(D.numel())


def nuclear(preset: Preset, steps: int) -> Callable[[Tensor], Tensor]:
    """D [m, …] → √(m/n) times the sum of singular values of D seen as [m, n], [], by way of ⟨D, polar(D)⟩.

    The dual of √(n/m) times the largest singular value, which is how much the root mean square of a layer's input can
    grow by in its output.

    Args:
        preset, steps: as for `fallline.polar.polar`, on which the error depends.
    """

    def size(D: Tensor) -> Tensor:
        X = D.flatten(1)
        m, n = X.shape
        return (X * polar(X, preset, steps)).sum() * sqrt(m / n)

    return size
