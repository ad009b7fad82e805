"""Optimizers from small parts: `chain(a, b, …)` is one rule, `partition({role: chain})` gives each role its own.

A transform turns u, at first the gradient, into the direction to subtract; what leaves the last one is applied as

    W ← (1 − η λ) W − η u

with learning rate η and decoupled weight decay λ. Calling a chain or a partition with parameters makes the optimizer:

    optimizer = chain(Sign())(model, lr=1e-3)

In one step every parameter that has a gradient is visited: first all `measure`, then all `update`. A parameter without
a gradient is left alone, state included. The arithmetic is at least float32 whatever the parameter is stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ..contracts import Change
from ..errors import InputError
from ..linalg import sum_dtype
from .base import Named, check_dense
from .roles import DECAYED, ROLES, Leaves, Params, Role, leaves
from .state import State
from .transform import Context, Members, Transform

__all__ = ["Chain", "ChainOptimizer", "Context", "Fused", "Partition", "State", "Transform", "chain", "partition"]

Found = dict[tuple[Any, ...], dict[str, Tensor]]
"""What was measured: place (transform and those it is reduced over) → name → value."""

Fused = Callable[[Members, float | Tensor, float], None]
"""(parameters with their states by transform, learning rate, weight decay) → updates them all. An execution detail:
for plain float32 and float64 tensors of at most two dimensions it must equal the transforms one after another, followed
by the update in this module's docstring."""


@dataclass(frozen=True)
class Chain:
    """Transforms in order, and perhaps a fast path that equals them."""

    transforms: tuple[Transform, ...]
    fused: Fused | None = None

    def __call__(
        self,
        params: Params,
        *,
        lr: float | Mapping[Role, float],
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> ChainOptimizer:
        """An optimizer that gives every role this rule; see `Partition.__call__`."""
        return partition(dict.fromkeys(ROLES, self))(params, lr=lr, weight_decay=weight_decay, seed=seed)

    def items(self) -> Iterator[tuple[str, Transform]]:
        """(label, transform) in order; the label, the class's name, is the key of its state."""
        seen: dict[str, int] = {}
        for transform in self.transforms:
            label = type(transform).__name__.lower()
            seen[label] = seen.get(label, 0) + 1
            yield (label if seen[label] == 1 else f"{label}{seen[label]}"), transform


@dataclass(frozen=True)
class Partition:
    """A chain for each role."""

    rules: Mapping[Role, Chain]

    def __call__(
        self,
        params: Params,
        *,
        lr: float | Mapping[Role, float],
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> ChainOptimizer:
        """The optimizer.

        Args:
            params: model, name → (parameter, role), or (name, parameter) pairs.
            lr: learning rate η, or one for each role.
            weight_decay: λ, for the roles in `DECAYED`.
            seed: of the run.

        Raises:
            InputError: parameters without names, or of a role that has no rule.
        """
        found = leaves(params)
        rates = {role: lr[role] if isinstance(lr, Mapping) else lr for role in self.rules}
        return ChainOptimizer(found, self.rules, rates, weight_decay, seed)


def chain(*transforms: Transform, fused: Fused | None = None) -> Chain:
    """One rule out of transforms, in order.

    Args:
        transforms: what they get and give is in `Transform`.
        fused: a fast path that equals them.
    """
    return Chain(transforms, fused)


def partition(rules: Mapping[Role, Chain]) -> Partition:
    """A rule for each role. Roles that share a chain are one group to transforms that measure over ``group``."""
    return Partition(rules)


class ChainOptimizer(Named):
    """What `chain` and `partition` make.

    Attributes:
        plain: use no fast path, to compare with.
    """

    plain = False

    def __init__(
        self,
        found: Leaves,
        rules: Mapping[Role, Chain],
        rates: Mapping[Role, float],
        weight_decay: float,
        seed: int,
    ) -> None:
        self.rules, self.seed = rules, seed
        for name, (_, role) in found.trained.items():
            self._rule(role, name)
        transforms = [t for rule in rules.values() for t in rule.transforms]
        self._measures = any(measures(t) for t in transforms)
        self.separable = not any(t.scope != "leaf" for t in transforms)
        named = {
            role: " → ".join(label + transform.told() for label, transform in rule.items()) or "as is"
            for role, rule in rules.items()
        }

        def options(role: Role) -> dict[str, float]:
            lr = rates.get(role, next(iter(rates.values())))
            return {"lr": lr, "weight_decay": weight_decay if role in DECAYED else 0.0}

        super().__init__(
            found, "; ".join(f"{role}: {text}" for role, text in named.items()), options, defaults={"lr": 0.0}
        )

    def _rule(self, role: Role, name: str) -> Chain:
        if role not in self.rules:
            raise InputError(f"parameter {name!r} is a {role}, for which this optimizer has no rule")
        return self.rules[role]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: clears gradients, computes the loss and its gradients, and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        visits = [self._visits(group) for group in self.param_groups]
        found = self._measured(visits) if self._measures else {}
        for group, members in zip(self.param_groups, visits, strict=True):
            rule: Chain | None = self.rules.get(group["role"])
            if rule is None or not members:
                continue
            decay = group["weight_decay"]
            fast = [] if self.plain or rule.fused is None else [leaf for leaf in members if suits_fused(leaf[0])]
            if rule.fused is not None and fast:
                rule.fused(fast, group["lr"], decay)
            if len(fast) < len(members):
                done = {ctx.name for ctx, _ in fast}
                for ctx, state in members:
                    if ctx.name not in done:
                        apply(rule, ctx, state, decay, found)
            for _, state in members:
                state["step"] += 1
        return loss

    def _visits(self, group: dict[str, Any]) -> list[tuple[Context, State]]:
        lr = torch.as_tensor(group["lr"], dtype=None if isinstance(group["lr"], Tensor) else torch.float64)
        visits = []
        for p in group["params"]:
            if p.grad is None:
                continue
            name = self.name_of(p)
            check_dense(name, p.grad)
            state = self.state[p]
            if not state:
                state["step"] = 0
                for label, transform in self._rule(group["role"], name).items():
                    state[label] = transform.init(unsharded(p) if transform.whole else p)
            visits.append((Context(name, p, p.grad, state["step"], lr, self.seed), state))
        return visits

    def _measured(self, visits: Sequence[Members]) -> Found:
        parts: dict[tuple[Any, ...], dict[str, list[tuple[str, Tensor]]]] = {}
        reduce: dict[tuple[Any, ...], str] = {}
        for group, members in zip(self.param_groups, visits, strict=True):
            for ctx, state in members:
                rule = self.rules[group["role"]]
                for label, transform in rule.items():
                    if not measures(transform):
                        continue
                    place = place_of(transform, rule, label, ctx)
                    reduce[place] = transform.reduce
                    g = ctx.grad.full_tensor() if transform.whole and isinstance(ctx.grad, DTensor) else ctx.grad
                    for key, value in transform.measure(g, state[label], ctx).items():
                        parts.setdefault(place, {}).setdefault(key, []).append((ctx.name, value))

        def reduced(values: list[tuple[str, Tensor]], how: str) -> Tensor:
            # in the order of names, so that the order of parameters does not change a bit
            column = torch.stack([value for _, value in sorted(values, key=lambda pair: pair[0])])
            return column.sum() if how == "sum" else column.max()

        return {at: {key: reduced(v, reduce[at]) for key, v in found.items()} for at, found in parts.items()}

    def followed(self, state: State, change: Change, role: Role) -> State:
        found: State = {"step": state["step"]}
        for label, transform in self.rules[role].items():
            kept = transform.remap(state[label], unsharded_change(change) if transform.whole else change)
            if kept is None:
                return {}
            found[label] = kept
        return found


def measures(transform: Transform) -> bool:
    """Whether it looks at gradients before any parameter is updated."""
    return type(transform).measure is not Transform.measure


def place_of(transform: Transform, rule: Chain, label: str, ctx: Context) -> tuple[Any, ...]:
    """What measurements of one transform are reduced together."""
    return {"leaf": (label, ctx.name), "group": (label, id(rule)), "all": (label,)}[transform.scope]


def suits_fused(ctx: Context) -> bool:
    """Whether a fast path may have this parameter."""
    p = ctx.param
    return (
        p.dtype in (torch.float32, torch.float64)
        and ctx.grad.dtype == p.dtype
        and p.ndim <= 2
        and not isinstance(p, DTensor)
    )


def apply(rule: Chain, ctx: Context, state: State, decay: float, found: Found) -> None:
    """The plain path for one parameter: all transforms, then W ← (1 − η λ) W − η u."""
    u = ctx.grad.to(torch.promote_types(sum_dtype(ctx.grad), ctx.param.dtype), copy=True)
    for label, transform in rule.items():
        ctx.measured = found.get(place_of(transform, rule, label, ctx), {})
        update = gathered if transform.whole and isinstance(u, DTensor) else type(transform).update
        u = update(transform, u, state[label], ctx)
    w = ctx.param.to(u.dtype)  # the parameter itself where the dtype is the same
    if decay:
        w.mul_(1 - ctx.lr * decay)
    w.sub_(u.mul_(ctx.lr))
    if w is not ctx.param:
        ctx.param.copy_(w)


def gathered(transform: Transform, u: Tensor, state: State, ctx: Context) -> Tensor:
    """`transform.update` of a sharded u that it needs whole; the result is sharded alike."""
    assert isinstance(u, DTensor)
    whole = transform.update(u.full_tensor(), state, ctx)
    everywhere = [Replicate()] * u.device_mesh.ndim
    return DTensor.from_local(whole, u.device_mesh, everywhere).redistribute(placements=u.placements)


def unsharded(p: Tensor) -> Tensor:
    """A plain tensor like p, without its values: what the state of the whole of a sharded parameter is made from."""
    return torch.empty(p.shape, dtype=p.dtype, device=p.device) if isinstance(p, DTensor) else p


def unsharded_change(change: Change) -> Change:
    """The same for a state that is whole."""
    assert change.old is not None
    assert change.new is not None
    return replace(change, old=nn.Parameter(unsharded(change.old)), new=nn.Parameter(unsharded(change.new)))
