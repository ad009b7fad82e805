"""Projected gradient ascent on what a layer gives out: the worst small change of embeddings or hidden states.

    δ ← Π(δ + η rule(g)),   g = ∂ value / ∂δ,   Π: every token's δ back into the ball ‖δ_t‖ ≤ radius

The rule is g / ‖g‖ by token (`unit`), or `Adam`.

Only δ is asked for a gradient, so that parameters and their `.grad` stay as they are (`frozen` also saves what the
backward would keep for them). An attack belongs into `prepare`, where it sees the whole step at once: its random start
then does not depend on how the step is cut, and a closure that asks again meets the same δ. So it is made with dropout
off, while the forward that trains under it has dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def ball(delta: Tensor, radius: float | Tensor) -> Tensor:
    """The nearest point with ‖δ_t‖₂ ≤ radius at every token; delta: [..., D]."""
    norm = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
    return torch.where(norm > radius, delta * (radius / norm), delta)


def unit(g: Tensor) -> Tensor:
    """Every token's g / ‖g‖; a token without a gradient stays 0. g: [..., D]."""
    norm = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
    return torch.where(norm > 0, g / norm, 0)


class Adam:
    """The steps of Adam, m̂ / (√v̂ + ε), for one ascent; an element whose gradient is always 0 stays."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, g: Tensor) -> Tensor:
        if not self.step:
            self.m, self.v = torch.zeros_like(g), torch.zeros_like(g)
        self.step += 1
        self.m.lerp_(g, 1 - 0.9)
        self.v.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
        m, v = self.m / (1 - 0.9**self.step), self.v / (1 - 0.999**self.step)
        return m / (v.sqrt() + 1e-8)


@torch.enable_grad()
def ascend(
    value: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    size: float | Tensor,
    radius: float | Tensor,
    rule: Callable[[Tensor], Tensor] = unit,
) -> Tensor:
    """δ after some steps from a start in the ball.

    Args:
        value: what shall grow, [], of δ. start: [..., D]. steps: how many. size: η, what a step of the rule is times.
        radius: of the ball. rule: makes a step of the gradient.
    """
    delta = start.detach()
    for _ in range(steps):
        delta.requires_grad_()
        (g,) = torch.autograd.grad(value(delta), delta)
        delta = ball(delta.detach() + size * rule(g), radius)
    return delta


@contextmanager
def frozen(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters require no gradient; afterwards those do that did."""
    trained = [p for p in params if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def added(module: nn.Module, delta: Tensor) -> Iterator[None]:
    """Inside, a module gives out δ more: of its output's shape, rounded to its dtype. Of a tuple, the first output.

    Nothing is compiled inside: compiled code does not know of hooks. Layers that 🤗 Transformers checkpoints are right
    in the backward too, where the hook is gone: what is computed again is their forward, to which no hook belongs.
    """

    def add(layer: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return add(layer, args, output[0]), *output[1:]
        return output + delta.to(output.dtype)

    with torch.compiler.set_stance("force_eager"), module.register_forward_hook(add):
        yield
