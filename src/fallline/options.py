"""Typed hyper-parameters: frozen dataclasses that check themselves.

A method owns a frozen dataclass of its hyper-parameters, derived from `Options`, each field made with `option`:

    @dataclass(frozen=True)
    class Config(Options):
        lr: float = option(1e-3, "peak learning rate", gt=0, source="paper, table 3")
        nesterov: bool = option(False, "look ahead", used_if=("momentum > 0", lambda c: c.momentum > 0))

Constructing one, from Python or from a recipe, checks types, bounds and `check()`; `from_mapping` also refuses unknown
keys and options that were given but can have no effect.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, Self, Union, get_args, get_origin

from .errors import InputError, nearest

UsedIf = tuple[str, Callable[[Any], bool]]


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    source: str = "",
    used_if: UsedIf | None = None,
) -> Any:
    """One field of an `Options` dataclass.

    Args:
        default: value when the user gives none; leave it out for a required option.
        help: one line, shown by `fallline methods show`.
        gt, ge, lt, le: bounds for numbers, applied to every element of a tuple.
        source: where the default comes from.
        used_if: (condition in words, predicate on the finished options): when the predicate is false the option has no
            effect, and giving it is an error.
    """
    bounds = {k: v for k, v in {"gt": gt, "ge": ge, "lt": lt, "le": le}.items() if v is not None}
    return field(default=default, metadata={"help": help, "bounds": bounds, "source": source, "used_if": used_if})


@dataclass(frozen=True)
class Options:
    """Base of every hyper-parameter dataclass; see the module docstring."""

    def __post_init__(self) -> None:
        hints = type_hints(type(self))
        for f in fields(self):
            value = convert(getattr(self, f.name), hints[f.name], f.name)
            check_bounds(value, f.metadata.get("bounds", {}), f.name)
            object.__setattr__(self, f.name, value)
        self.check()

    def check(self) -> None:
        """Refuse combinations of options that are impossible; raise `InputError` with a sentence."""

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any], what: str, where: Callable[[str], str] = lambda key: "") -> Self:
        """Build from keys a user wrote.

        Args:
            given: key → value; lists stand for tuples.
            what: how to name this part in an error, such as ``optimizer 'scale'``.
            where: key → ``" (recipes/tiny.yaml:4)"`` or an empty string.

        Raises:
            InputError: unknown or missing key, wrong type, value out of bounds, idle option, impossible combination.
        """
        known = {f.name: f for f in fields(cls)}
        for key in given:
            if key not in known:
                raise InputError(f"{what} has no option {key!r}; {nearest(key, known)}{where(key)}")
        for name, f in known.items():
            if f.default is MISSING and f.default_factory is MISSING and name not in given:
                raise InputError(f"{what} needs the option {name!r}: {f.metadata.get('help', '')}{where('')}")
        hints = type_hints(cls)
        for key, value in given.items():  # one by one, so that the error can name the line
            try:
                check_bounds(convert(value, hints[key], key), known[key].metadata.get("bounds", {}), key)
            except InputError as error:
                raise InputError(f"{what}: {error}{where(key)}") from None
        try:
            options = cls(**given)
        except InputError as error:
            raise InputError(f"{what}: {error}{where('')}") from None
        for key in given:
            used_if = known[key].metadata.get("used_if")
            if used_if is not None and not used_if[1](options):
                raise InputError(f"{what}: {key!r} has no effect unless {used_if[0]}; remove it{where(key)}")
        return options

    def to_mapping(self) -> dict[str, Any]:
        """Plain YAML-able values, without the options that have no effect; `from_mapping` reads them back."""
        out: dict[str, Any] = {}
        for f in fields(self):
            used_if = f.metadata.get("used_if")
            if used_if is None or used_if[1](self):
                value = getattr(self, f.name)
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out


def type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def describe(kind: Any) -> str:
    """A type as a user would say it: ``a number``, ``one of linear, cosine``."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join("nothing (null)" if a is type(None) else describe(a) for a in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        several = {bool: "true or false", int: "whole numbers", float: "numbers", str: "texts"}
        number = "" if args[1:] == (...,) else f"{len(args)} "
        return f"a list of {number}{several.get(args[0]) or describe(args[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "any value"}
    return names.get(kind, str(kind))


def convert(value: Any, kind: Any, name: str) -> Any:
    """`value` as `kind`: whole floats become ints, ints floats, lists tuples; nothing else changes."""
    origin, args = get_origin(kind), get_args(kind)
    wrong = InputError(f"{name!r} must be {describe(kind)}, got {value!r}")
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return convert(value, arg, name)
            except InputError:
                continue
        raise wrong
    if kind is Any:
        return value
    if kind is type(None):
        if value is None:
            return None
        raise wrong
    if origin is Literal:
        if value in args and type(value) is type(args[args.index(value)]):
            return value
        raise InputError(f"{name!r} must be {describe(kind)}, got {value!r}; {nearest(str(value), map(str, args))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        if args[1:] == (...,):
            return tuple(convert(v, args[0], name) for v in value)
        if len(value) != len(args):
            raise wrong
        return tuple(convert(v, a, name) for v, a in zip(value, args, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise InputError(f"{name!r} must be a finite number, got {value!r}")
        return float(value)
    if kind is int and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not value.is_integer():
            raise wrong
        return int(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, typing.cast(type, kind)):
        return value
    raise wrong


def check_bounds(value: Any, bounds: Mapping[str, float], name: str) -> None:
    """Raise `InputError` unless every number in `value` satisfies gt, ge, lt, le."""
    tests: dict[str, tuple[str, Callable[[float, float], bool]]] = {
        "gt": ("above", lambda v, b: v > b),
        "ge": ("at least", lambda v, b: v >= b),
        "lt": ("below", lambda v, b: v < b),
        "le": ("at most", lambda v, b: v <= b),
    }
    for v in value if isinstance(value, tuple) else (value,):
        if isinstance(v, int | float):
            for key, bound in bounds.items():
                if not tests[key][1](v, bound):
                    limits = " and ".join(f"{tests[k][0]} {b:g}" for k, b in bounds.items())
                    raise InputError(f"{name!r} must be {limits}, got {v!r}")
