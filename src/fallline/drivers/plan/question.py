"""From what somebody asks to what is sized."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InputError
from ...recipe import WORDS, Recipe, Settings
from ..skeleton import shape_of
from .forecast import forecast, setup_of
from .table import Row, combinations, verdict


def plan(model: str, *, memory: float, length: int = 1024, batch: int = 8, device: str = "cpu") -> list[Row]:
    """Every combination for a model, best first, see `table.ORDER`.

    Args:
        model: a preset, a 🤗 folder or hub id, or the folder of a run; its weights are not read.
        memory: bytes there are.
        length: tokens of a row. batch: rows of a step.
        device: ``cpu`` or ``cuda``, there or not.

    Raises:
        InputError: no such model, or not positive numbers.
    """
    for name, value in (("memory", memory), ("length", length), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value:g}")
    first = setup_of(recipe_of([], length, batch), shape_of(model), device)
    return combinations(first, memory=memory, batch=batch, device=device)


def explain(model: str, words: str, *, memory: float, length: int = 1024, batch: int = 8, device: str = "cpu") -> Row:
    """One combination.

    Args:
        words: such as ``optimizer=fira,rank=64,adapter=lora,checkpointing=true,micro=2``: keys of a recipe, and options
            of the method named last. Others: as for `plan`.

    Raises:
        InputError: as `plan`, or an unknown word.
    """
    setup = setup_of(recipe_of(overrides(words), length, batch), shape_of(model), device)
    found = forecast(setup)
    return Row(setup, found, verdict(found.peak, memory))


def recipe_of(words: Sequence[str], length: int, batch: int) -> Recipe:
    """The recipe that a question is about; its model stands for any."""
    return Recipe.parse(
        f"model: {{name: llama, preset: tiny}}\ndata: {{name: python-source, length: {length}}}\nbatch: {batch}\n"
        "steps: 1\nschedule: constant",
        *words,
        origin="plan",
    )


def overrides(words: str) -> list[str]:
    """``optimizer=fira,rank=64,checkpointing=true`` as overrides of a recipe.

    Raises:
        InputError: an option before any method.
    """
    found, method = list[str](), ""
    for word in filter(None, (w.strip() for w in words.split(","))):
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--explain takes key=value, with commas between, got {word!r}")
        if key in WORDS:
            method = key
            found.append(word)
        elif key in ("checkpointing", "attention"):
            found.append(f"model.{word}")
        elif key in Settings.__dataclass_fields__:
            found.append(word)
        elif method:
            found.append(f"{method}.{key}={value}")
        else:
            raise InputError(f"--explain: {key!r} is an option of no method; name the method first: optimizer=…,{word}")
    return found
