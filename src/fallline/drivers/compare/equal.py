"""What is held equal: each choice's settings that make it so, as overrides of its recipe.

tokens   every choice sees as many tokens as the first; where a step has other numbers of them, steps change
time     every choice trains as long as the first, by the measured time of a step; steps change
memory   every choice may use as much memory as the one that needs most; rows in a step change, steps do not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ...recipe import Recipe
from .measuring import Meter, MeterError

Settings = dict[str, list[str]]
"""Label → overrides."""

CLOSE = 0.01
"""Share of the memory by which a choice may miss what the hungriest needs."""
FASTER = 4
"""Times as many rows as in the measurement before, at most."""
TRIES = 5
"""Measurements of a choice, each in a process of its own."""


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
            time = known[label]["time"]
            ratio = time["ratio"] if time["to"] == first else time["step"] / known[first]["time"]["step"]
            factor = 1 / ratio
        number = max(1, round(steps * factor))
        same = number == recipe.settings.steps or recipe.settings.steps != steps
        found[label] = [] if same else [f"steps={number}"]
    return found


def equal_memory(recipes: Mapping[str, Recipe], stop: Callable[[], bool]) -> Settings:
    """Rows in a step with which every choice needs about as much memory as the one that needs most.

    The memory of a row is measured with twice the rows, and from what comes of it again, until it is close. A choice
    that cannot be measured is left as it is.
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
        measured = partial(peak_with, recipes[label])
        more = rows if stop() else most_rows(measured, rows, at_first, most)
        found[label] = settings(recipes[label], more) if more > rows else []
    return found


def most_rows(measured: Callable[[int], int], rows: int, at_first: int, most: int) -> int:
    """How many rows fit, to within `CLOSE` or `TRIES` measurements.

    Args:
        measured: rows → bytes. rows: that are known to fit. at_first: bytes that they take. most: bytes there are.
    """
    fits, guess = rows, 2 * rows
    too_many: float = math.inf
    for _ in range(TRIES if at_first < (1 - CLOSE) * most else 0):
        try:
            found: float = measured(guess)
        except MeterError:
            found = math.inf
        if found > (1 + CLOSE) * most:
            too_many = guess
        else:
            fits = guess
        of_a_row = (found - at_first) / (guess - rows)
        farthest = FASTER * guess  # rows may cost nothing at first
        ahead = rows + int((most - at_first) / of_a_row) if of_a_row > 0 else farthest
        ahead = min(ahead, farthest)
        if not fits < ahead < too_many:
            ahead = int(fits + too_many) // 2 if too_many < math.inf else fits
        if ahead == fits:
            break
        guess = ahead
    return fits


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


def peak_with(recipe: Recipe, rows: int) -> int:
    return peak(widened(recipe, rows))


def peak(recipe: Recipe) -> int:
    """Measured bytes, in a process of its own."""
    with Meter(recipe) as meter:
        return int(meter.found["memory"]["peak"])
