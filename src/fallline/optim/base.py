"""What every optimizer of ours promises beyond torch's: state by parameter name, and parameters that may change.

`Named` goes before a torch optimizer among the bases of a class:

    class AdamW(Named, torch.optim.AdamW): ...

There is one parameter group for each role, also where it is empty: a schedule takes its rates from the groups there are
when it is made, and a parameter that comes later needs the group of its role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import Change
from ..errors import InputError, nearest
from ..trees import copied
from .roles import ROLES, Leaves, Role, guess_role
from .state import State, follow, placed


class Named(torch.optim.Optimizer):
    """A torch optimizer whose state goes by parameter name, and whose parameters may come, go and change shape.

    Attributes:
        rule: what it computes, in words; a saved state of another rule is refused.
        separable: whether the update of a parameter depends on that parameter alone, so that `step` with the gradients
            of some of them, and then of the others, is the same as with all at once.
    """

    separable: bool = True

    def __init__(
        self,
        leaves: Leaves,
        rule: str,
        options: Callable[[Role], Mapping[str, Any]] = lambda role: {},
        **arguments: Any,
    ) -> None:
        """
        Args:
            leaves: the parameters.
            rule: see the class.
            options: role → what its group has other than the defaults.
            arguments: those of the torch optimizer.
        """
        self.rule = rule
        self._names = {p: name for name, (p, _) in leaves.trained.items()}
        self._roles = leaves.frozen | {name: role for name, (_, role) in leaves.trained.items()}
        self._kept: dict[str, State] = {}
        groups = [
            {"role": role, "params": [p for p, r in leaves.trained.values() if r == role], **options(role)}
            for role in ROLES
        ]
        super().__init__(groups, **arguments)

    def name_of(self, p: nn.Parameter) -> str:
        """The name of a parameter that is being trained."""
        return self._names[p]

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, by parameter name.

        Returns:
            ``rule``; ``state`` {name: {…}}; ``groups`` [{role, lr, …, params: [name]}]; ``shapes`` {name: […]};
            ``kept`` {name: {shape, state}} of frozen parameters that come back. Leaves are tensors, numbers, strings.
        """
        groups = [
            {k: copied(v) for k, v in group.items() if k != "params" and v is not None}
            | {"params": [self._names[p] for p in group["params"]]}
            for group in self.param_groups
        ]
        here = {self._names[p]: p for group in self.param_groups for p in group["params"]}
        return {
            "rule": self.rule,
            "state": {name: dict(self.state[p]) for name, p in here.items() if self.state.get(p)},
            "groups": groups,
            "shapes": {name: [*p.shape] for name, p in here.items()},
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, copied to each parameter's device, dtypes as they were.

        Raises:
            InputError: it is of another rule, or of other parameters. Nothing was changed.
        """
        here = {name: p for p, name in self._names.items()}
        self._check_saved(state_dict, here)
        for group, other in zip(self.param_groups, state_dict["groups"], strict=True):
            for key, value in other.items():
                if key == "params":
                    continue
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)  # a rate that is a tensor may be held elsewhere too
                else:
                    group[key] = value.item() if isinstance(value, Tensor) else value
        self.state.clear()
        for name, values in state_dict["state"].items():
            self.state[here[name]] = placed(values, here[name])
        self._kept = {name: copied(values) for name, values in state_dict["kept"].items()}

    def _check_saved(self, state_dict: Mapping[str, Any], here: Mapping[str, nn.Parameter]) -> None:
        if "rule" not in state_dict:
            raise InputError(
                "the saved state is not of an optimizer of Fallline; resume with the optimizer that it was saved by"
            )
        if state_dict["rule"] != self.rule:
            raise InputError(f"the saved optimizer state is of {state_dict['rule']!r}, this is {self.rule!r}")
        saved: dict[str, Role] = {name: group["role"] for group in state_dict["groups"] for name in group["params"]}
        for name, role in saved.items():
            if name not in here:
                raise InputError(f"the saved optimizer state has {name!r}, which is not trained; {nearest(name, here)}")
            if role != self._roles[name]:
                raise InputError(f"{name!r} was saved with the role {role!r}, here it is {self._roles[name]!r}")
            if state_dict["shapes"][name] != [*here[name].shape]:
                was = state_dict["shapes"][name]
                raise InputError(f"{name!r} was saved with the shape {was}, here it is {[*here[name].shape]}")
        for name in here:
            if name not in saved:
                raise InputError(f"the saved optimizer state has nothing for {name!r}; {nearest(name, saved)}")

    def remap(self, changes: Sequence[Change]) -> None:
        """Follow parameters that were frozen or removed, added or thawed, or replaced by others of another shape.

        A parameter that goes loses its state, or with policy ``keep`` finds it again on return. One that comes joins
        the group of its role: the one it had, else the one its name suggests. One that is replaced carries over the
        state of the elements it continues; new elements begin at zero.

        Raises:
            InputError: a change does not fit the parameters there are.
        """
        for change in changes:
            self._remap(change)

    def _remap(self, change: Change) -> None:
        name, old, new = change.name, change.old, change.new
        if old is not None and self._names.get(old) != name:
            known = self._names.values()
            raise InputError(f"cannot change {name!r}, it is not trained under that name; {nearest(name, known)}")
        if old is None and name in self._names.values():
            raise InputError(f"cannot add {name!r}: there is a trained parameter of that name")
        for p in (old, new):
            if p is not None:
                p.grad = None
        if old is None and new is not None:
            kept = self._kept.get(name)
            if kept is not None:
                if tuple(kept["shape"]) != tuple(new.shape):
                    raise InputError(f"{name!r} left with shape {kept['shape']} and comes back as {[*new.shape]}")
                self.state[new] = placed(self._kept.pop(name)["state"], new)
            role = self._roles.setdefault(name, guess_role(name, new.ndim))
            self._group(role)["params"].append(new)
        elif old is not None:
            state = self.state.get(old)
            params = self._group(self._roles[name])["params"]
            place = next(i for i, p in enumerate(params) if p is old)
            if new is None:
                del params[place]
                if change.policy == "keep" and state:
                    self._kept[name] = {"shape": [*old.shape], "state": state}
            else:
                if state:
                    self.state[new] = self.followed(state, change, self._roles[name])
                params[place] = new
            self.state.pop(old, None)
            del self._names[old]
        if new is not None:
            self._names[new] = name

    def _group(self, role: Role) -> dict[str, Any]:
        return next(group for group in self.param_groups if group["role"] == role)

    def followed(self, state: State, change: Change, role: Role) -> State:
        """A replaced parameter's state; none, so that it begins anew, where that had another shape than it."""
        return follow(state, change) or {}

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The model holds the weights to evaluate and export; here those it has anyway."""
        yield


def check_dense(name: str, grad: Tensor) -> None:
    """Refuse a sparse gradient.

    Raises:
        InputError: it is one.
    """
    if grad.layout != torch.strided:
        raise InputError(f"the gradient of {name!r} is sparse: make its embedding with sparse=False")


def align_gradients(optimizer: Named, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A hook before `step` that gives gradients and state the strides of their parameter.

    torch's fused optimizers read all of them in memory order and check nothing: a gradient that was set by hand with
    other strides would silently update the wrong elements. A closure is called here, so that its gradients are seen.

    Raises:
        InputError: a parameter has gaps in memory, for which no gradient can be right, or a sparse gradient.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            name = optimizer.name_of(p)
            check_dense(name, p.grad)
            if p.grad.stride() != p.stride():
                p.grad = placed(p.grad, p)
                if p.grad.stride() != p.stride():
                    raise InputError(f"parameter {name!r} is a view with gaps in memory; train a contiguous copy")
            if not p.is_contiguous():
                optimizer.state[p] = placed(optimizer.state[p], p)
    return (args[0], None if closure is None else lambda: loss), {}
