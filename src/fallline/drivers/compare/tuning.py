"""Equal tuning: the same grid for every choice, widened where its best is on an edge, and one rule for giving up.

The values of the grid are equally far apart on a logarithmic scale. They are tried from the middle outwards, so that
early ones are good references. A choice whose best value is the lowest or highest tried gets one more, a step further
out, until it is not, or until as many were added as the grid has; then it is marked as on the edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import InputError

LOST_FROM = 1 / 3
LOST_SHARE = 0.25
RULE = (
    "A trial stops at an evaluation in the last two thirds of its steps when its validation loss is behind that of the "
    "choice's best finished trial at that step by more than a quarter of what that one had gained by then, or is not "
    "finite; a best value on the edge of the range widens it by one trial at a time"
)


@dataclass(frozen=True)
class Tune:
    """What is tuned, and over which range.

    Attributes:
        key: of the recipe, such as ``optimizer.lr``.
        low, high: of the range, above 0.
        trials: values in it.
    """

    key: str
    low: float
    high: float
    trials: int

    @classmethod
    def parse(cls, text: str) -> Tune:
        """From ``key=low:high`` or ``key=low:high:trials``; two trials a decade and one more when not given.

        Raises:
            InputError: it is neither, or a range that cannot be.
        """
        key, equals, span = text.partition("=")
        try:
            low, high = (float(x) for x in span.split(":")[:2])
            decades = math.log10(high / low)
            more = span.split(":")[2:]
            trials = int(more[0]) if more else max(3, round(2 * decades) + 1)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise InputError(f"--tune is key=low:high, such as optimizer.lr=1e-4:1e-1, got {text!r}") from None
        if not equals or not key or len(more) > 1:
            raise InputError(f"--tune is key=low:high, such as optimizer.lr=1e-4:1e-1, got {text!r}")
        if not (0 < low < high < math.inf) or trials < 3:
            raise InputError(f"--tune needs 0 < low < high and at least 3 trials, got {text!r}")
        found = cls(key, low, high, trials)
        if len({*found.grid()}) < trials:
            raise InputError(f"--tune: {trials} trials are too many for so narrow a range, got {text!r}")
        return found

    def grid(self) -> list[float]:
        """The values, ascending, of three significant digits."""
        return [self.at(i) for i in range(self.trials)]

    def at(self, place: int) -> float:
        """The value at a place of the grid, from 0, or beyond its ends."""
        return float(f"{self.low * (self.high / self.low) ** (place / (self.trials - 1)):.3g}")

    def place(self, value: float) -> int:
        """The place of a value that `at` gave."""
        return round(math.log(value / self.low) / math.log(self.high / self.low) * (self.trials - 1))


def next_value(tune: Tune, tried: Mapping[float, float | None]) -> float | None:
    """The value to try next, or None when tuning is through.

    Args:
        tune: range and number of trials.
        tried: value → final validation loss; None where the trial failed or was given up.
    """
    grid = tune.grid()
    middle = (len(grid) - 1) / 2
    for value in sorted(grid, key=lambda v: abs(grid.index(v) - middle)):
        if value not in tried:
            return value
    found = best(tried)
    if found is None or len(tried) >= 2 * tune.trials:
        return None
    ahead = 1 if found == max(tried) else -1 if found == min(tried) else 0
    value = tune.at(tune.place(found) + ahead)
    return None if value in tried else value


def best(tried: Mapping[float, float | None]) -> float | None:
    """The value with the lowest loss, None when none came through."""
    finite = {v: loss for v, loss in tried.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=lambda v: (finite[v], v)) if finite else None


def is_lost(step: int, steps: int, loss: float, start: float, reference: Mapping[int, float]) -> bool:
    """Whether a trial should be given up, by `RULE`.

    Args:
        step: of this evaluation. steps: of the whole trial.
        loss: validation loss now. start: before the first step.
        reference: step → validation loss of the choice's best finished trial; empty when there is none.
    """
    if not math.isfinite(loss):
        return True
    there = reference.get(step)
    if there is None or step < LOST_FROM * steps or step >= steps:
        return False
    return loss - there > LOST_SHARE * max(start - there, 0.0)


def reference_curve(curves: Sequence[tuple[float | None, Mapping[int, float]]]) -> Mapping[int, float]:
    """The curve of the lowest final loss, of (final loss, step → validation loss) pairs; empty when there is none."""
    finished = [(loss, i) for i, (loss, _) in enumerate(curves) if loss is not None and math.isfinite(loss)]
    return curves[min(finished)[1]][1] if finished else {}
