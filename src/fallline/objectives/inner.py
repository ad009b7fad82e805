"""The loss inside another: objectives that alter what a second one computes name it by `of` and `options`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..catalog import find
from ..contracts import Objective
from ..errors import InputError


def inner(of: str, options: Any) -> Objective:
    """The objective `of`, built.

    Args:
        options: its options by name; None: its defaults.

    Raises:
        InputError: no objective has this id, or its options are wrong.
    """
    given = {} if options is None else options
    if not isinstance(given, Mapping):
        raise InputError(f"'options' must be options of {of!r} by name, got {given!r}")
    module = find("objective", of).load()
    return module.build(module.Config.from_mapping(given, f"objective {of!r}"))
