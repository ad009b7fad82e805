"""What a rule is made of: a transform, and what it may know about the parameter it acts on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..contracts import Change
from ..noise import rng
from .state import State, follow


@dataclass(slots=True)
class Context:
    """What a transform may know beside u and its own state. It changes none of it.

    Attributes:
        name: of the parameter.
        param: the parameter, before this step's update.
        grad: its gradient, untouched.
        step: how many updates this parameter had before, from 0; begins anew when its state does.
        lr: learning rate, 0-d.
        seed: of the run.
        measured: what this transform's `measure` found, reduced over its scope.
    """

    name: str
    param: Tensor
    grad: Tensor
    step: int
    lr: Tensor
    seed: int
    measured: dict[str, Tensor] = field(default_factory=dict)

    def rng(self, stream: str) -> torch.Generator:
        """A generator that depends on seed, step, `stream` and this parameter's name, and on nothing else."""
        return rng(self.seed, self.step, f"{stream}/{self.name}", self.param.device)


Members = Sequence[tuple[Context, State]]
"""The parameters of one group that have a gradient, each with its state."""


class Transform:
    """One part of a rule, acting on one parameter at a time.

    A transform holds hyper-parameters only. State is nested dicts of tensors, numbers and strings. `u` and `state` are
    donated: `update` may overwrite them, and nothing else. Control flow uses `ctx.step`, never a tensor's value. A
    proximal map is a last transform: u ← p − prox(p − u).

    Attributes:
        acts_on: how much of the parameters it looks at together.
        scope: over what `measure` is reduced: this parameter, those that share the chain, or all that have this kind
            of transform.
        reduce: how.
        whole: whether it needs all of a matrix at once. Of a sharded parameter it is then given the gathered u, on
            every rank alike, and its state is whole; `ctx.param` and `ctx.grad` stay sharded.
        nonnegative: names of its state's tensors that are never below zero, which fewer bits can hold.
    """

    acts_on: Literal["element", "row", "matrix", "group"] = "element"
    scope: Literal["leaf", "group", "all"] = "leaf"
    reduce: Literal["sum", "max"] = "sum"
    whole: bool = False
    nonnegative: frozenset[str] = frozenset()

    def told(self) -> str:
        """What of its hyper-parameters the layout of its state depends on, in words; a saved state must agree."""
        return ""

    def init(self, param: Tensor) -> State:
        """The state of one parameter before its first update."""
        return {}

    def measure(self, g: Tensor, state: State, ctx: Context) -> dict[str, Tensor]:
        """Scalars from the gradient g as it came, taken before any parameter is updated; may write state."""
        return {}

    def update(self, u: Tensor, state: State, ctx: Context) -> Tensor:
        """The next u, of the parameter's shape."""
        raise NotImplementedError

    def remap(self, state: State, change: Change) -> State | None:
        """The state after the parameter was replaced: carried over by element. None where that cannot be: then all that
        the chain knew of the parameter is forgotten, and it begins anew."""
        return follow(state, change)
