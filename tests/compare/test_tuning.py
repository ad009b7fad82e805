"""Equal tuning: grid, widening, and giving up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from fallline.drivers.compare.tuning import Tune, best, is_lost, next_value, reference_curve
from fallline.errors import InputError

TUNE = Tune("optimizer.lr", 1e-4, 1e-1, 7)


def trials(loss: Callable[[float], float | None]) -> dict[float, float | None]:
    """All trials that tuning makes of this landscape, in order."""
    tried: dict[float, float | None] = {}
    while (value := next_value(TUNE, tried)) is not None:
        assert value not in tried
        tried[value] = loss(value)
    return tried


def on_edge(tried: dict[float, float | None]) -> bool:
    return best(tried) in (min(tried), max(tried))


def bowl(at: float) -> Callable[[float], float]:
    return lambda lr: 3 + math.log10(lr / at) ** 2


def test_the_grid_is_even_in_decades():
    assert TUNE.grid() == [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1]
    assert Tune.parse("optimizer.lr=1e-4:1e-1") == TUNE
    assert Tune.parse("optimizer.lr=1e-4:1e-1:4").grid() == [1e-4, 1e-3, 1e-2, 1e-1]
    assert Tune.parse("optimizer.lr=1e-3:2e-3").trials == 3


def test_an_optimum_inside_costs_the_same_for_all_and_begins_in_the_middle():
    for at in (5e-4, 2e-3, 2e-2):
        tried = trials(bowl(at))
        assert sorted(tried) == TUNE.grid()
        assert not on_edge(tried)
    assert next(iter(tried)) == 3.16e-3
    assert {*list(tried)[-2:]} == {1e-4, 1e-1}


@pytest.mark.parametrize(("at", "more"), [(0.32, [0.316, 1.0]), (3e-5, [3.16e-5, 1e-5])])
def test_an_optimum_on_the_edge_widens_the_range(at: float, more: list[float]):
    tried = trials(bowl(at))
    assert list(tried)[7:] == more
    assert best(tried) == more[0]
    assert not on_edge(tried)


def test_widening_ends_and_is_flagged():
    tried = trials(lambda lr: -lr)
    assert len(tried) == 14
    assert on_edge(tried)


def test_what_fails_is_beyond_the_optimum_and_no_edge():
    tried = trials(lambda lr: None if lr > 0.05 else -lr)
    assert sorted(tried) == TUNE.grid()
    assert best(tried) == 3.16e-2
    assert not on_edge(tried)
    assert best(trials(lambda lr: None)) is None
    assert len(trials(lambda lr: math.nan)) == 7


def test_a_tie_takes_the_smaller_value():
    assert best({1e-3: 2.0, 1e-2: 2.0}) == 1e-3


@pytest.mark.parametrize(
    ("step", "loss", "lost"),
    [
        (30, 9.0, False),  # too early to say
        (40, 5.51, True),  # the reference gained 2 by then: a quarter is 0.5
        (40, 5.49, False),
        (50, 9.0, False),  # the reference was not evaluated there
        (100, 9.0, False),  # through anyway
        (10, math.nan, True),
        (100, math.inf, True),
    ],
)
def test_a_trial_is_given_up_by_one_rule(step: int, loss: float, lost: bool):
    reference = {0: 7.0, 30: 6.0, 40: 5.0, 100: 4.0}
    assert is_lost(step, 100, loss, 7.0, reference) is lost
    assert is_lost(step, 100, loss, 7.0, {}) is not math.isfinite(loss)


def test_a_reference_that_gained_nothing_is_only_to_be_matched():
    assert is_lost(50, 100, 7.2, 7.0, {50: 7.1})
    assert not is_lost(50, 100, 7.1, 7.0, {50: 7.1})


def test_the_reference_is_the_best_that_finished():
    curves = [(5.0, {1: 5.0}), (None, {1: 1.0}), (4.0, {1: 4.5}), (math.nan, {1: 2.0})]
    assert reference_curve(curves) == {1: 4.5}
    assert reference_curve([]) == {}


@pytest.mark.parametrize(
    "text",
    [
        "optimizer.lr",
        "optimizer.lr=1",
        "optimizer.lr=a:b",
        "optimizer.lr=1:1.01:20",
        "optimizer.lr=1e-2:1e-3",
        "optimizer.lr=0:1",
        "optimizer.lr=1e-3:1e-1:2",
        "optimizer.lr=1e-3:1e-1:5:5",
        "optimizer.lr=1e-3:inf",
    ],
)
def test_a_range_that_cannot_be_is_refused(text: str):
    with pytest.raises(InputError, match="--tune"):
        Tune.parse(text)
