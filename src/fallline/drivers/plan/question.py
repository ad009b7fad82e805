"""From what somebody asks to what is sized."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from ...errors import InputError, nearest
from ...models.llama import PRESETS
from ...models.loading import check_length
from ...recipe import Recipe
from ...written import commas
from ..skeleton import shape_of
from .forecast import forecast, setup_of
from .table import Row, combinations, verdict

METHODS = ("optimizer", "adapter", "objective", "estimator")
KEYS = {"precision": "precision", "micro": "micro"} | {
    k: f"model.{k}" for k in ("checkpointing", "attention", "quantise")
}
"""What else decides about memory → key of the recipe."""

LEAST_LENGTH = 8
"""Tokens in a row, as sources of data have it."""

FLAGS = {"model": "MODEL", "data": "--length", "batch": "--batch", "device": "--device"}
"""Keys of a recipe that are asked otherwise."""


def plan(model: str, *, memory: float, length: int = 1024, batch: int = 8, device: str = "cpu") -> list[Row]:
    """Every combination for a model, best first, see `table.ORDER`.

    Args:
        model: a preset, a 🤗 folder or hub id, or the folder of a run; its weights are not read.
        memory: bytes there are.
        length: tokens of a row. batch: rows of a step.
        device: ``cpu`` or ``cuda``, there or not.

    Raises:
        InputError: no such model, not positive numbers, or rows longer than it has positions.
    """
    shape = asked_shape(model, memory=memory, length=length, batch=batch)
    return combinations(setup_of(recipe_of([], length, batch), shape, device), memory=memory)


def explain(model: str, words: str, *, memory: float, length: int = 1024, batch: int = 8, device: str = "cpu") -> Row:
    """One combination.

    Args:
        words: such as ``optimizer=fira,rank=64,adapter=lora,checkpointing=true,micro=2``: `METHODS` and `KEYS`, and
            options of the method named last. Others: as for `plan`.

    Raises:
        InputError: as `plan`, or an unknown word.
    """
    shape = asked_shape(model, memory=memory, length=length, batch=batch)
    setup = setup_of(recipe_of(overrides(words), length, batch), shape, device)
    found = forecast(setup)
    return Row(setup, found, verdict(found.peak, memory))


def asked_shape(model: str, *, memory: float, length: int, batch: int) -> PretrainedConfig:
    """The model's 🤗 configuration.

    Raises:
        InputError: as `plan`.
    """
    for name, value, least in (("memory", memory, 1), ("length", length, LEAST_LENGTH), ("batch", batch, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value:g}")
    shape = shape_of(model)
    if model not in PRESETS:  # whose positions are as many as a recipe's rows need
        check_length(shape, length, model)
    return shape


def recipe_of(words: Sequence[str], length: int, batch: int) -> Recipe:
    """The recipe that a question is about; its model stands for any."""
    return Recipe.parse(
        f"model: {{name: pretrained, path: any}}\ndata: {{name: python-source, length: {length}}}\nbatch: {batch}\n"
        "steps: 1\nschedule: constant",
        *words,
        origin="plan",
    )


def overrides(words: str) -> list[str]:
    """``optimizer=fira,rank=64,checkpointing=true`` as overrides of a recipe.

    Raises:
        InputError: an option before any method, or a key that has no effect on memory.
    """
    found, method = list[str](), ""
    for word in filter(None, (w.strip() for w in commas(words))):
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--explain takes key=value, with commas between, got {word!r}")
        if key in METHODS:
            method = key
            found.append(word)
        elif key in KEYS:
            found.append(f"{KEYS[key]}={value}")
        elif key in FLAGS:
            raise InputError(f"--explain: {key!r} is not of a combination; give it as {FLAGS[key]}")
        elif key in Recipe.KEYS:
            raise InputError(f"--explain: {key!r} has no effect on memory; {nearest(key, (*METHODS, *KEYS))}")
        elif method:
            found.append(f"{method}.{key}={value}")
        else:
            raise InputError(f"--explain: {key!r} is an option of no method; name the method first: optimizer=…,{word}")
    return found
