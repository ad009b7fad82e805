"""How private noisy sums are: ε and δ by dp-accounting, none of it our own.

A step draws every example with probability q, independently, and gives out the sum of what they contribute, each of
norm C at most, plus N(0, (zC)²) in every coordinate. T such steps are (ε, δ)-private for adding or removing one
example; ε is an upper bound, from the privacy loss distribution of the subsampled Gaussian, composed T times.

Cost: seconds; tens of seconds to calibrate where z comes out far below 1. The package is the extra `private`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

from .errors import InputError


@cache
def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """ε of T steps.

    Args:
        noise: z, the noise's standard deviation in units of C; 0 gives ∞.
        rate: q, 0 … 1.
        steps: T.
        delta: δ.

    Raises:
        InputError: dp-accounting is not installed.
    """
    accounting = _accounting()
    if noise == 0:
        return math.inf
    with _in_words(f"noise {noise:g}"):
        return float(_fresh(accounting).compose(_event(accounting, rate, steps)(noise)).get_epsilon(delta))


@cache
def calibrated(epsilon: float, rate: float, steps: int, delta: float) -> float:
    """The least noise z, to 1e-4 and rounded up, with which T steps are (ε, δ)-private; arguments as in `epsilon`.

    Raises:
        InputError: dp-accounting is not installed.
    """
    accounting = _accounting()
    event = _event(accounting, rate, steps)
    with _in_words(f"epsilon {epsilon:g}"):
        return float(accounting.calibrate_dp_mechanism(lambda: _fresh(accounting), event, epsilon, delta, tol=1e-4))


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    """Tell in one line what the library cannot do."""
    try:
        yield
    except (ValueError, RuntimeError, OverflowError, ArithmeticError) as error:
        raise InputError(f"dp-accounting cannot count with {what}: {error}") from error


def accountant() -> str:
    """Who does the sums, for a record."""
    return f"PLD, dp-accounting {version('dp-accounting')}"


def _accounting() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
    except ImportError:
        raise InputError("private training needs the package dp-accounting; pip install 'fallline[private]'") from None
    return dp_accounting


def _fresh(accounting: Any) -> Any:
    return accounting.pld.PLDAccountant(accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)


def _event(accounting: Any, rate: float, steps: int) -> Callable[[float], Any]:
    """z → what happens to the data."""

    def event(noise: float) -> Any:
        step = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise))
        return accounting.SelfComposedDpEvent(step, steps)

    return event
