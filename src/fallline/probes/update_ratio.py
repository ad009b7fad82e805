"""How far a step moves the weights, relative to their size.

‖W_{t+1} − W_t‖₂ / ‖W_t‖₂ over all trained parameters together. Around 1e-3 is usual in a healthy run; a value near 1
says that the learning rate is too large, one near 1e-6 that the step does nothing. Costs one copy of the trained
parameters on the steps it looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..catalog import Card
from ..contracts import Change, Signals
from ..linalg import norms, sum_dtype
from ..options import Options, option
from ..step import Run

CARD = Card(
    id="update-ratio",
    kind="probe",
    summary="Size of the update relative to the weights, in metrics.jsonl under update_ratio.",
    equation="‖W_{t+1} − W_t‖ / ‖W_t‖ over all trained parameters",
    flops="two norms and one copy of the trained parameters, every `every` steps",
    checked="equals the ratio taken by hand; a run with the probe is bit-identical to one without",
    tags=("metrics", "update", "norm"),
)


@dataclass(frozen=True)
class Config(Options):
    """When to look."""

    every: int = option(10, "steps between looks", gt=0)


class UpdateRatio:
    """Copies the weights before a step and compares after it."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._before: dict[str, Tensor] = {}
        self._ratio: Tensor | None = None

    @torch.no_grad()
    def before_step(self, run: Run) -> Sequence[Change]:
        due = run.step % self.every == 0
        self._before = {name: p.detach().clone() for name, p in run.trainable().items()} if due else {}
        return ()

    @torch.no_grad()
    def after_step(self, run: Run, signals: Signals) -> Sequence[Change]:
        self._ratio = None
        if self._before:
            now = run.trainable()
            kept = {n: old for n, old in self._before.items() if n in now and now[n].shape == old.shape}
            size = whole(list(kept.values()))
            moved = torch._foreach_sub(list(kept.values()), [now[n].detach() for n in kept])
            self._ratio = whole(moved) / size
            self._before = {}
        return ()

    def metrics(self) -> dict[str, float]:
        """{"update_ratio": …} when the last step was looked at, else nothing."""
        return {} if self._ratio is None else {"update_ratio": self._ratio.item()}


def whole(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖₂ of all together, []."""
    return norms(tensors, sum_dtype(tensors[0])).norm()


def build(config: Config) -> UpdateRatio:
    return UpdateRatio(config.every)
