"""What is compared: the recipe once per choice, each with a label.

--over optimizer=adamw,scale --over schedule=cosine,wsd        four choices
--over "optimizer={name: adamw, lr: 2e-3},scale"               a method with its options
--over optimizer=all                                           every method of that kind
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ...catalog import KINDS, entries
from ...errors import InputError, nearest
from ...recipe import Recipe
from ...written import commas, read

OWN = ("out", "seed", "sample", "tracker", "checkpoint", "probes")
"""Keys that a choice cannot be about: the comparison sets them, or they change nothing that it measures."""


@dataclass(frozen=True)
class Choice:
    """One of the things compared.

    Attributes:
        label: unlike all others.
        changes: recipe key → value, as `--over` gave it.
        recipe: resolved; None when it cannot be made.
        error: why not.
    """

    label: str
    changes: Mapping[str, str]
    recipe: Recipe | None
    error: str = ""

    @property
    def folder(self) -> str:
        """The label as a name of a folder."""
        plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", self.label).strip("-.")[:60]
        return plain if plain == self.label else f"{plain}-{hashlib.sha256(self.label.encode()).hexdigest()[:6]}"


def make_choices(
    path: str | Path, overrides: Sequence[str], over: Sequence[str], trials: Sequence[str] = ()
) -> list[Choice]:
    """The choices that `--over` makes of a recipe, in its order; the first is the baseline.

    Args:
        path: of the recipe.
        overrides: ``key=value`` for all of them.
        over: ``key=a,b,…`` texts; several are combined each with each. ``all`` stands for the whole catalogue.
        trials: overrides that every choice must take one by one, tried here and left out again: what is tuned. With
            one of them, too, choices must differ.

    Raises:
        InputError: a key or value that cannot be used. What comes from ``all`` and cannot be used becomes a choice
            with its error instead.
    """
    if not over:
        raise InputError("nothing to compare: give --over key=a,b, such as --over optimizer=adamw,scale")
    keys: dict[str, list[str]] = {}
    whole: list[str] = []
    for text in over:
        key, values = _read(text)
        if key in keys:
            raise InputError(f"--over names {key!r} twice; give all its values at once: {key}=a,b")
        if values == ["all"] and key in KINDS:
            values = [id for kind, id in entries() if kind == key]
            whole.append(key)
        keys[key] = values
    for key in keys.keys() - whole if whole else ():  # what was typed must be right, whatever the catalogue holds
        for value in keys[key]:
            Recipe.load(path, *overrides, f"{key}={value}")
    choices, tried = [], []
    for combined in product(*keys.values()):
        changes = dict(zip(keys, combined, strict=True))
        label = " ".join(_label(key, value) for key, value in changes.items())
        try:
            recipe = Recipe.load(path, *overrides, *map("=".join, changes.items()), *again(overrides, changes))
            parsed = [Recipe.parse(recipe.to_yaml(), trial, origin=label) for trial in trials]
            tried += [Choice(label, changes, one) for one in parsed[:1]]
            choices.append(Choice(label, changes, recipe))
        except InputError as error:
            if not whole:
                raise
            choices.append(Choice(label, changes, None, str(error)))
    check_choices(choices)
    if tried:
        check_choices([*tried, *(c for c in choices if c.recipe is None)])
    return choices


def again(overrides: Sequence[str], changes: Mapping[str, str]) -> list[str]:
    """The overrides of options of a method that a choice replaces, which would be lost with the old one: they are for
    all choices, but for one that sets the option itself."""
    keys = ((override, override.partition("=")[0]) for override in overrides)
    return [o for o, key in keys if key.partition(".")[0] in changes and "." in key and not sets(changes, key)]


def sets(changes: Mapping[str, str], key: str) -> bool:
    """Whether a choice is about a key such as ``optimizer.lr``, by itself or among the options of its method."""
    head, *options = key.split(".")
    value: Any = read(changes.get(head, ""), head).value
    for option in options:
        if not isinstance(value, dict) or option not in value:
            return key in changes
        value = value[option].value
    return key in changes or bool(options)


def check_choices(choices: Sequence[Choice]) -> None:
    """Refuse what would be run twice.

    Raises:
        InputError: fewer than two choices, two of one label, or two whose runs would be the same.
    """
    if len(choices) < 2:
        raise InputError(f"nothing to compare {choices[0].label!r} with: give at least two values, --over key=a,b")
    seen: dict[str, Choice] = {}
    for choice in choices:
        same = {choice.label} | ({identity(choice.recipe)} if choice.recipe is not None else set())
        for key in same:
            if key in seen:
                raise InputError(f"the choices {seen[key].label!r} and {choice.label!r} are the same; leave one out")
        seen |= dict.fromkeys(same, choice)


def identity(recipe: Recipe) -> str:
    """A hash of the recipe, without what a choice cannot be about."""
    kept = {k: v for k, v in recipe.to_mapping().items() if k not in OWN}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _read(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    head = key.split(".")[0]
    if not equals or not values.strip():
        raise InputError(f"--over is key=a,b,…, got {text!r}")
    if head not in Recipe.KEYS:
        raise InputError(f"--over: unknown key {head!r}; {nearest(head, Recipe.KEYS)}")
    if head in OWN:
        why = "use --seeds" if head == "seed" else "the comparison sets it, or it changes nothing that is measured"
        raise InputError(f"--over cannot be about {head!r}: {why}")
    found = [value.strip() for value in commas(values)]
    if "" in found:
        raise InputError(f"--over: an empty value in {text!r}")
    return key, found


def _label(key: str, value: str) -> str:
    """`scale` for a method, `scale lr=1e-3` for one with options, `batch=8` for the rest."""
    if key in KINDS:
        inner = re.fullmatch(r"\{(.*)\}", value.strip())
        if inner is None:
            return value
        parts = [part.partition(":") for part in commas(inner[1])]
        named = [v.strip() for k, _, v in parts if k.strip() == "name"]
        return " ".join(named + [f"{k.strip()}={v.strip()}" for k, _, v in parts if k.strip() != "name"])
    return f"{key.rpartition('.')[2]}={value}"
