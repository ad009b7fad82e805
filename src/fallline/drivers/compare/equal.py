"""What is held equal: each choice's settings that make it so, as overrides of its recipe.

tokens   every choice sees as many tokens as the first; where a step has other numbers of them, steps change
time     every choice trains as long as the first, by the measured time of a step; steps change
memory   every choice may use as much memory as the one that needs most; rows in a step change, steps do not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...recipe import Recipe
from .measuring import Meter, MeterError

Settings = dict[str, list[str]]
"""Label → overrides."""

CLOSE = 0.01
"""Share of the memory by which a choice may miss what the hungriest needs."""


def equal_steps(recipes: Mapping[str, Recipe], measured: Mapping[str, Mapping[str, Any]], by_time: bool) -> Settings:
    """Steps for equal tokens, or equal time, of the choices that were measured.

    A choice keeps its steps where steps are what is compared, or where nothing differs.
    """
    found: Settings = {}
    known = {label: m for label, m in measured.items() if "time" in m}
    first = next((label for label in recipes if label in known), None)
    if first is None:
        return found
    steps = recipes[first].settings.steps
    for label, recipe in recipes.items():
        if label not in known:
            continue
        factor = known[first]["tokens"] / known[label]["tokens"]
        if by_time:
            factor = 1.0 if label == first else 1 / known[label]["time"]["ratio"]
        number = max(1, round(steps * factor))
        same = number == recipe.settings.steps or recipe.settings.steps != steps
        found[label] = [] if same else [f"steps={number}"]
    return found


def equal_memory(recipes: Mapping[str, Recipe], stop: Callable[[], bool]) -> Settings:
    """Rows in a step with which every choice needs about as much memory as the one that needs most.

    The memory of a row is measured with twice the rows; what comes of it is measured again and lowered until it fits.
    A choice that cannot be measured is left as it is.
    """
    peaks: dict[str, int] = {}
    for label, recipe in recipes.items():
        if stop():
            return {}
        try:
            peaks[label] = peak(recipe)
        except MeterError:
            continue
    most = max(peaks.values(), default=0)
    found: Settings = {}
    for label, at_first in peaks.items():
        rows = width(recipes[label])
        found[label] = []
        if at_first > (1 - CLOSE) * most or stop():
            continue
        try:
            of_a_row = (peak(widened(recipes[label], 2 * rows)) - at_first) / rows
            more = rows + int((most - at_first) / max(of_a_row, 1.0))
            while more > rows and peak(widened(recipes[label], more)) > (1 + CLOSE) * most:
                more = min(more - 1, rows + int(0.9 * (more - rows)))
        except MeterError:
            continue
        if more > rows:
            found[label] = settings(recipes[label], more)
    return found


def width(recipe: Recipe) -> int:
    """Rows in a forward pass, on which memory depends."""
    return recipe.settings.micro or recipe.settings.batch


def settings(recipe: Recipe, rows: int) -> list[str]:
    """Overrides that give a forward pass so many rows; a step has as many forward passes as before."""
    if recipe.settings.micro is None:
        return [f"batch={rows}"]
    return [f"micro={rows}", f"batch={recipe.settings.batch * rows // recipe.settings.micro}"]


def widened(recipe: Recipe, rows: int) -> Recipe:
    return Recipe.parse(recipe.to_yaml(), *settings(recipe, rows), name=recipe.name)


def peak(recipe: Recipe) -> int:
    """Measured bytes, in a process of its own."""
    with Meter(recipe) as meter:
        return int(meter.found["memory"]["peak"])
