"""What is held equal."""

from __future__ import annotations

from typing import Any

from fallline.drivers.compare.choices import make_choices
from fallline.drivers.compare.equal import equal_steps, settings, widened
from fallline.recipe import Recipe


def measured(**found: tuple[int, float]) -> dict[str, Any]:
    return {label: {"tokens": tokens, "time": {"ratio": ratio}} for label, (tokens, ratio) in found.items()}


def recipes(*over: str, steps: int = 100) -> dict[str, Recipe]:
    found = make_choices("recipes/tiny.yaml", [f"steps={steps}"], over)
    return {c.label: c.recipe for c in found if c.recipe is not None}


def test_equal_tokens_changes_steps_where_a_step_has_other_tokens():
    found = equal_steps(recipes("batch=8,16,6"), measured_rows(), by_time=False)
    assert found == {"batch=8": [], "batch=16": ["steps=50"], "batch=6": ["steps=133"]}


def measured_rows() -> dict[str, Any]:
    return {f"batch={b}": {"tokens": 128 * b, "time": {"ratio": b / 8}} for b in (8, 16, 6)}


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
