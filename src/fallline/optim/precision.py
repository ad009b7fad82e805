"""Parameters in bfloat16: updates below half a unit in the last place (0.4 % of a weight) would be rounded away.

`low_precision` wraps any optimizer of ours so that it works on float32 copies of the parameters. Afterwards

    master        W ← bf16(w), and the copy w is kept: 4 bytes more state per parameter
    stochastic    W ← bf16(w) rounded up or down with probabilities that make E[W] = w, and w is forgotten

A stochastic rounding depends on seed, step and the parameter's name alone. Copies and float32 gradients that are not
kept exist for `BUCKET` elements at a time, provided the optimizer treats parameters one by one (`separable`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..contracts import Change
from ..errors import InputError
from ..noise import rng
from .base import Named
from .roles import Leaves, Role, classify, leaves

Precision = Literal["float32", "bfloat16", "bfloat16-stochastic"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16-stochastic": torch.bfloat16}
"""What parameters are stored in."""

BUCKET = 1 << 26
"""Elements: 512 MiB of copies and gradients at a time."""


def pick_precision(name: Any, device: str) -> Precision:
    """`name`, with ``auto`` decided for the kind of device."""
    found: Precision = ("float32" if device == "cpu" else "bfloat16") if name == "auto" else name
    return found


def low_precision(
    make: Callable[[Mapping[str, tuple[nn.Parameter, Role]]], Named],
    model: nn.Module,
    own: Iterable[tuple[str, nn.Parameter]] = (),
    precision: Precision = "bfloat16",
    *,
    seed: int = 0,
) -> Named:
    """An optimizer for a model in this precision.

    Args:
        make: {name: (parameter, role)} → the optimizer.
        model: whose parameters to train.
        own: the objective's parameters, names beginning with ``objective.``.
        precision: ``float32``: the optimizer as `make` makes it; ``bfloat16``: with float32 masters;
            ``bfloat16-stochastic``: with stochastic rounding. Parameters that are float32 stay plain.
        seed: of the run.

    Raises:
        InputError: a parameter in another half precision, or an optimizer that needs the loss at other weights.
    """
    found = classify(model)
    named = {name: (p, found[name]) for name, p in model.named_parameters()}
    named |= {name: (p, "objective") for name, p in own}
    if precision == "float32":
        return make(named)
    return LowPrecision(make, leaves(named), precision == "bfloat16", seed)


class LowPrecision(Named):
    """An optimizer on float32 copies of bfloat16 parameters."""

    def __init__(
        self,
        make: Callable[[Mapping[str, tuple[nn.Parameter, Role]]], Named],
        found: Leaves,
        master: bool,
        seed: int,
    ) -> None:
        for name, (p, _) in found.trained.items():
            if p.dtype not in (torch.bfloat16, torch.float32):
                raise InputError(f"parameter {name!r} is {p.dtype}; only bfloat16 and float32 are trained")
        self.master, self.seed, self.steps = master, seed, 0
        self._copies = {name: stand_in(p) for name, (p, _) in found.trained.items()}
        self._versions: dict[str, int] = {}
        named = {name: (self._copies[name], role) for name, (_, role) in found.trained.items()}
        for name, role in found.frozen.items():  # so that the wrapped optimizer knows its role when it is thawed
            named[name] = nn.Parameter(torch.empty(0), requires_grad=False), role
        self.inner = make(named)
        if getattr(self.inner, "needs_closure", False) or type(self.inner).evaluated is not Named.evaluated:
            raise InputError("an optimizer that sets weights outside its update cannot work on copies; use float32")
        options = {group["role"]: group for group in self.inner.param_groups}
        mode = "float32 masters" if master else "stochastic rounding"
        super().__init__(
            found,
            f"{self.inner.rule}, {mode}",
            lambda role: {k: v for k, v in options[role].items() if k not in ("params", "role")},
            defaults={"lr": 0.0},
        )
        self.separable = self.inner.separable

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; arguments as for any torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner |= {k: v for k, v in group.items() if k != "params"}
        for bucket in self._buckets():
            for name, p in bucket:
                self._copies[name].data = self._load(name, p)
                self._copies[name].grad = None if p.grad is None else p.grad.to(self._copies[name].dtype)
            self.inner.step()
            for name, p in bucket:
                self._store(name, p)
        self.steps += 1
        return loss

    def _buckets(self) -> Iterator[list[tuple[str, nn.Parameter]]]:
        bucket: list[tuple[str, nn.Parameter]] = []
        size = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.separable and bucket and size + p.numel() > BUCKET:
                    yield bucket
                    bucket, size = [], 0
                bucket.append((self.name_of(p), p))
                size += p.numel()
        if bucket:
            yield bucket

    def _load(self, name: str, p: nn.Parameter) -> Tensor:
        if p.dtype == torch.float32:
            return p.data
        w: Tensor | None = self.state[p].get("master")
        if w is None:
            return p.detach().float()
        if self._versions.get(name) != p._version:  # somebody wrote to the parameter: that is the weight now
            w.copy_(torch.where(w.to(p.dtype) == p, w, p))
        return w

    def _store(self, name: str, p: nn.Parameter) -> None:
        copy = self._copies[name]
        copy.grad = None
        if p.dtype == torch.float32:
            return
        if self.master:
            self.state[p]["master"] = copy.data
            p.copy_(copy)
        else:
            p.copy_(round_stochastic(copy.data, rng(self.seed, self.steps, f"round/{name}", p.device)))
            copy.data = hollow(p)
        self._versions[name] = p._version

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer of ours, and ``inner``, that of the wrapped one, and ``steps``."""
        return super().state_dict() | {"inner": self.inner.state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.inner.load_state_dict(state_dict["inner"])
        self.steps = state_dict["steps"]
        self._versions.clear()

    def remap(self, changes: Sequence[Change]) -> None:
        super().remap(changes)
        for change in changes:
            old = None if change.old is None else self._copies.pop(change.name)
            if change.new is not None:
                self._copies[change.name] = stand_in(change.new)
            new = self._copies.get(change.name)
            self.inner.remap([Change(change.name, old, new, change.index, change.policy)])
            self._versions.pop(change.name, None)


def round_stochastic(w: Tensor, noise: torch.Generator) -> Tensor:
    """float32 → bfloat16, up or down with probabilities that keep the expectation; bfloat16 values stay as they are.

    bfloat16 is the upper half of float32: adding a uniform 16-bit integer to the lower half carries into the upper one
    with the right probability.
    """
    bits = torch.randint(0, 1 << 16, w.shape, dtype=torch.int32, generator=noise, device=w.device)
    rounded = bits.add_(w.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(w.isfinite(), rounded, w).to(torch.bfloat16)  # a carry must not turn a NaN into a number


def hollow(p: Tensor) -> Tensor:
    """A float32 tensor of the shape of `p` that takes four bytes, to hold its place between steps."""
    return torch.zeros((), dtype=torch.float32, device=p.device).expand(p.shape)


def stand_in(p: nn.Parameter) -> nn.Parameter:
    """What the wrapped optimizer has in place of `p`."""
    return nn.Parameter(p.data if p.dtype == torch.float32 else hollow(p))
