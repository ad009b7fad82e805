"""What is held equal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from fallline.drivers.compare.choices import make_choices
from fallline.drivers.compare.equal import equal_steps, most_rows, settings, widened
from fallline.drivers.compare.measuring import MeterError
from fallline.recipe import Recipe


def measured(**found: tuple[int, float]) -> dict[str, Any]:
    return {
        label: {"tokens": tokens, "time": {"ratio": ratio, "to": "adamw"}} for label, (tokens, ratio) in found.items()
    }


def recipes(*over: str, steps: int = 100) -> dict[str, Recipe]:
    found = make_choices("recipes/tiny.yaml", [f"steps={steps}"], over)
    return {c.label: c.recipe for c in found if c.recipe is not None}


def test_equal_tokens_changes_steps_where_a_step_has_other_tokens():
    found = equal_steps(recipes("batch=8,16,6"), measured_rows(), by_time=False)
    assert found == {"batch=8": [], "batch=16": ["steps=50"], "batch=6": ["steps=133"]}


def measured_rows() -> dict[str, Any]:
    return {f"batch={b}": {"tokens": 128 * b, "time": {"ratio": b / 8, "to": "batch=8"}} for b in (8, 16, 6)}


def test_equal_time_changes_steps_by_the_measured_ratio():
    found = equal_steps(recipes("optimizer=adamw,sgd,muon"), measured(adamw=(9, 1), sgd=(9, 0.8), muon=(9, 1.6)), True)
    assert found == {"adamw": [], "sgd": ["steps=125"], "muon": ["steps=62"]}


def test_steps_that_are_compared_stay():
    both = {label: {"tokens": 9, "time": {"ratio": 1.0}} for label in ("steps=50", "steps=100")}
    assert equal_steps(recipes("steps=50,100"), both, by_time=False) == {"steps=50": [], "steps=100": []}


def test_what_was_not_measured_has_no_settings():
    assert equal_steps(recipes("optimizer=adamw,sgd"), {"adamw": {"error": "no"}}, by_time=True) == {}


def test_more_rows_are_more_rows_in_a_forward_pass():
    whole = Recipe.load("recipes/tiny.yaml", "batch=8")
    assert settings(whole, 12) == ["batch=12"]
    parts = Recipe.load("recipes/tiny.yaml", "batch=8", "micro=2")
    assert settings(parts, 3) == ["micro=3", "batch=12"]
    assert widened(parts, 3).settings.batch == 12


@pytest.mark.parametrize(
    ("bytes_of", "expected"),
    [
        (lambda n: 100 + 10 * n, 30),  # as expected from the first look
        (lambda n: 100 + 10 * n + (300 if n > 20 else 0), 20),  # a step on the way
        (lambda n: 100 + 10 * max(n, 12), 30),  # the first rows are free
        (lambda n: 100 + 0.5 * n * n, 24),
    ],
)
def test_rows_are_added_until_the_memory_is_used(bytes_of: Callable[[int], float], expected: int):
    asked: list[int] = []

    def measured(n: int) -> int:
        asked.append(n)
        return int(bytes_of(n))

    found = most_rows(measured, 8, int(bytes_of(8)), 400)
    assert abs(found - expected) <= 1
    assert bytes_of(found) <= 404
    assert len(asked) <= 5


def test_rows_stay_where_there_is_nothing_to_gain_or_to_measure():
    def fails(n: int) -> int:
        raise MeterError("no memory")

    assert most_rows(fails, 8, 100, 400) == 8
    assert most_rows(fails, 8, 400, 400) == 8
    assert most_rows(lambda n: 1000 * n, 8, 100, 400) == 8


def test_rows_that_cost_nothing_are_added_with_care():
    asked: list[int] = []

    def measured(n: int) -> int:
        asked.append(n)
        return 100

    most_rows(measured, 8, 100, 10**9)
    assert all(after <= 4 * before for before, after in pairwise(asked))


def test_too_little_memory_is_too_many_rows():
    def measured(n: int) -> int:
        if n > 12:
            raise MeterError("no memory")
        return 10 * n

    assert 10 <= most_rows(measured, 8, 80, 400) <= 12
