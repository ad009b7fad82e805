"""What goes wrong, and what a user is told: one line that says what, where, and what would be right.

The exit codes of the command line:

| code | meaning |
|---|---|
| 0 | done |
| 1 | a defect in Fallline or in a part: a traceback follows, please report it |
| 2 | bad input: the recipe, the data, a name, a folder (`InputError`) |
| 3 | the run was stopped before an update because a loss or gradient was not finite (`NonFiniteError`) |
| 4 | storage failed during the run: disk full, folder gone (`StorageError`) |
| 130, 143 | Ctrl-C or SIGTERM: the step was finished and a checkpoint saved |
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable


class FalllineError(Exception):
    """Base of every error that is a sentence for the user rather than a defect."""

    exit_code = 1


class InputError(FalllineError, ValueError):
    """Something the user wrote or pointed at cannot be used. Nothing was changed."""

    exit_code = 2


class NonFiniteError(FalllineError, FloatingPointError):
    """A loss or gradient is NaN or infinite. Raised before the update; the message says where the weights are."""

    exit_code = 3


class StorageError(FalllineError, OSError):
    """The disk refused. The last good checkpoint is named in the message and loadable."""

    exit_code = 4


def check_package(package: str, extra: str) -> None:
    """Of a package that only an extra of this one installs.

    Raises:
        InputError: it is missing.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise InputError(f"the package {error.name} is missing; pip install 'fallline[{extra}]'") from None


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest valid one, or all of them when none is close.

    >>> nearest("adamv", ["adamw", "sgd"])
    "did you mean 'adamw'?"
    >>> nearest("zzz", ["adamw", "sgd"])
    'valid: adamw, sgd'
    """
    known = sorted(set(names))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(known)}" if known else "nothing is valid here"
