"""The per-example engine of an estimator: for what is trained now, and tried on the first batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..contracts import Batch
from ..per_example import PerExample, check
from ..problem import Problem
from ..step import Run


class Watched:
    """Keeps an engine from step to step."""

    def __init__(self) -> None:
        self._engine: PerExample | None = None
        self._tried = False

    def engine(self, run: Run) -> PerExample:
        """For the run's trained parameters.

        Raises:
            InputError: one is in a layer of an unknown kind.
        """
        if self._engine is None or not self._engine.fits(run.trainable()):
            objective: Any = run.objective
            self._engine = PerExample(run.model, objective if isinstance(objective, nn.Module) else None)
            self._tried = False
        return self._engine

    def tried(
        self,
        problem: Problem,
        view: Callable[[Batch], Batch] = lambda batch: batch,
        rows: Callable[[int], Tensor] | None = None,
    ) -> PerExample:
        """The same, after comparing one example of the first micro-batch that has two with an ordinary backward of it.

        Args:
            problem: the step's.
            view: a micro-batch as the watch shall see it.
            rows: what its examples then come to, of micro-batch i; None: their part of the loss.

        Raises:
            InputError: they differ.
        """
        engine = self.engine(problem.run)
        for i, batch in enumerate(map(view, problem.micro)):
            if not self._tried and examples(batch) > 1:
                check(engine, batch, partial(rows or problem.rows, i), at=examples(batch) // 2)
                self._tried = True
        return engine


def examples(batch: Batch) -> int:
    """B."""
    return len(batch["example_id"])
