"""What the schedules share: lengths given as steps or as a share, warm-up, and the torch scheduler that applies them.

A schedule is one pure function, ``multiplier(t, T, config)``: update t (0 … T − 1) of a run of T updates uses the peak
learning rate times this number. For t < W, the warm-up, it is (t + 1)/W, so that update 0 already learns and update
W − 1 has the peak rate; 🤗's schedules use t/W, one update later. From T on, a schedule stays at its last value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import InputError
from ..options import Options, option


def check_span(name: str, amount: float) -> None:
    """Refuse a number of steps that is not whole.

    Raises:
        InputError: `amount` is above 1 and not whole.
    """
    if amount >= 1 and not amount.is_integer():
        raise InputError(f"{name!r} is a number of steps from 1 on and must be whole, got {amount!r}")


def span(amount: float, T: int) -> int:
    """`amount` in steps: below 1 a share of T, rounded to the nearest; from 1 on, itself."""
    return round(amount * T) if amount < 1 else int(amount)


@dataclass(frozen=True)
class Warmup(Options):
    """The option that every schedule has."""

    warmup: float = option(
        0.05,
        "linear warm-up: below 1 a share of the run, from 1 on a number of steps",
        ge=0,
        source="usual for language models: 1 to 10 % of the run",
    )

    def check(self) -> None:
        check_span("warmup", self.warmup)

    def warmup_steps(self, T: int) -> int:
        """W, the updates of warm-up in a run of T.

        Raises:
            InputError: no update would be left.
        """
        W = span(self.warmup, T)
        if W >= T:
            raise InputError(f"'warmup' is {W} steps of a run of {T}; it must be at most {T - 1}")
        return W

    def check_run(self, steps: int) -> None:
        """Refuse a run that the schedule does not fit, before anything is loaded.

        Raises:
            InputError: no update would be left.
        """
        self.warmup_steps(steps)


class ScaledLR(LRScheduler):
    """Multiplies each group's peak learning rate by a function of the number of updates made.

    The rate is computed anew from (t, peak) at every step and on resume, never changed in place, so a resumed run has
    bit-identical rates; groups keep their ratios. A learning rate that is a tensor is filled in place.
    """

    def __init__(self, optimizer: Optimizer, multiplier: Callable[[int], float]) -> None:
        """
        Args:
            optimizer: its groups' `lr` are the peak rates.
            multiplier: t → factor.

        Raises:
            InputError: the schedule does not fit the length of the run; the optimizer is as it was.
        """
        multiplier(0)
        self.multiplier = multiplier
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at this point."""
        factor = self.multiplier(self.last_epoch)
        return [peak * factor for peak in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """How many updates were made, and the peak rates."""
        return {"t": self.last_epoch, "base_lrs": [float(peak) for peak in self.base_lrs]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue after `t` updates: the groups' rates are set at once.

        Raises:
            InputError: the state is of another library's schedule, or of another number of groups.
        """
        if "t" not in state_dict:
            raise InputError(
                "the saved state is not of a schedule of Fallline; resume with the schedule that it was saved by"
            )
        saved = state_dict["base_lrs"]
        if len(saved) != len(self.base_lrs):
            raise InputError(f"the saved schedule is of {len(saved)} parameter groups, here are {len(self.base_lrs)}")
        self.last_epoch = state_dict["t"]
        self._step_count = self.last_epoch + 1  # as torch counts: 1 would be a run that has not begun, and warned about
        self.base_lrs = [
            torch.full_like(here, peak) if isinstance(here, Tensor) else peak
            for here, peak in zip(self.base_lrs, saved, strict=True)
        ]
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = float(lr)
        self._last_lr = [
            g["lr"].clone() if isinstance(g["lr"], Tensor) else g["lr"] for g in self.optimizer.param_groups
        ]
