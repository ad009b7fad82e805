"""Adapters that change as a run goes on: ranks grow or are dropped, parameters freeze.

A method says before each update which size its layers are to have (`Adapter.sizes`); what changes goes through the
run's one door for such changes, so that the optimizer's state follows element by element. The sizes are part of the
state: a run that goes on has them before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..contracts import Change, Signals
from ..errors import InputError
from ..noise import rng
from ..step import Run
from .layers import method_of
from .rerank import layers_of, resize, sizes


class Between:
    """The part of a run that lets an adapter act between its steps.

    Args:
        name: of the adapter.

    Attributes:
        sizes: path → size at present; the part's state.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self.sizes: dict[str, int] = {}
        self._counts: Mapping[str, Tensor] = {}

    def check(self, run: Run) -> None:
        """
        Raises:
            InputError: the method changes sizes, and nobody has said how many steps there will be.
        """
        method = method_of(run.model, self.name)
        if method.resizes and run.steps is None:
            raise InputError(f"adapter {method.id!r} changes as the run goes on; say how many 'steps' there will be")
        self.sizes = sizes(run.model, self.name)

    def before_step(self, run: Run) -> Sequence[Change]:
        if run.steps is None:
            return ()
        changes = between(run.model, self.name, run.step, run.steps, seed=run.seed)
        if changes:
            self.sizes = sizes(run.model, self.name)
        return changes

    def after_step(self, run: Run, signals: Signals) -> Sequence[Change]:
        self._counts = method_of(run.model, self.name).counts(layers_of(run.model, self.name))
        return ()

    def metrics(self) -> dict[str, float]:
        """The method's counts after the last step."""
        return {f"adapter_{key}": value.item() for key, value in self._counts.items()}

    def restructure(self, run: Run, state: Mapping[str, Any]) -> Sequence[Change]:
        self.sizes = dict(state["sizes"])
        return resize(run.model, self.name, self.sizes)

    def state_dict(self) -> dict[str, Any]:
        return {"sizes": dict(self.sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """`restructure` has done it."""


def between(model: nn.Module, name: str, step: int, steps: int, *, seed: int) -> Sequence[Change]:
    """Give an adapter the sizes it is to have in update `step`, from 0, of `steps`, and carry over what was learned.

    Returns:
        What changed of the parameters that are trained.
    """
    wanted = method_of(model, name).sizes(layers_of(model, name), step, steps)
    if not wanted:
        return ()
    return resize(
        model, name, sizes(model, name) | dict(wanted), noise=lambda path: rng(seed, step, f"adapter/{path}/between")
    )
