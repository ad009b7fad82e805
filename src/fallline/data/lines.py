"""JSON Lines that hold an example each: which files, which of them are held out, and where what goes wrong stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from ..errors import InputError
from ..options import option
from .dataset import DataOptions
from .files import File, find_files, read_lines

T = TypeVar("T")

_NAMED = 5  # lines that a warning names


@dataclass(frozen=True, kw_only=True)
class LineOptions(DataOptions):
    """Where the lines are and how they are read."""

    path: str | tuple[str, ...] = option(
        help="files, folders (their *.jsonl, recursively) or patterns (** is any depth), one or a list"
    )
    chat: bool = option(
        True,
        "prompts and answers that are texts go through the model's chat template as user and assistant, where it has "
        "one; false keeps them as plain text",
    )
    validation: float = option(
        0.05,
        "fraction of the examples that is held out",
        gt=0,
        lt=1,
        source="as for documents",
        used_if=("'validation_path' is null", lambda c: c.validation_path is None),
    )
    validation_path: str | tuple[str, ...] | None = option(
        None, "files to hold out in place of a fraction, named like 'path' and left out of it"
    )

    def check(self) -> None:
        for name in ("path", "validation_path"):
            paths = _listed(getattr(self, name))
            if "" in paths or (not paths and getattr(self, name) is not None):
                raise InputError(f"{name!r} must name files, folders or patterns, got {getattr(self, name)!r}")


class Line(NamedTuple, Generic[T]):
    """An example, the file and line where it stands, and whether that file is held out."""

    where: str
    example: T
    held_out: bool


def read_examples(config: LineOptions, what: str, parse: Callable[[str], T]) -> Iterator[Line[T]]:
    """The examples of all files, in the order of the files and lines; those to hold out last.

    Args:
        config: which files.
        what: how to name the source in an error, such as ``data 'jsonl'``.
        parse: the example in a line; raises `InputError` without saying where.

    Raises:
        InputError: a path that is not there or names no files; a named file without an example; a line that is no
            example, which is named.
    """
    held_out = list(find_files(_listed(config.validation_path), ("jsonl",), what))
    apart = {file.path.resolve() for file in held_out}
    files = [file for file in find_files(_listed(config.path), ("jsonl",), what) if file.path.resolve() not in apart]
    if not files:
        raise InputError(f"{what}: 'validation_path' holds out all files of 'path'; nothing is left to train on")
    for group, apart_from_training in ((files, False), (held_out, True)):
        for where, example in read_files(group, what, parse):
            yield Line(where, example, apart_from_training)


def read_files(files: Iterable[File], what: str, parse: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """The examples of some files, in order, with the file and line where each stands; see `read_examples`."""
    for file in files:
        blank = True
        for number, line in read_lines(file.path, what):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            with located(what, where):
                if blank and line.lstrip().startswith("["):
                    raise InputError("a JSON array begins; give an object on each line, as jq -c '.[]' would write it")
                example = parse(line)
            blank = False
            yield where, example
        if blank and file.itself:
            raise InputError(f"{what}: the file {file.path} is empty or blank")


@contextmanager
def located(what: str, where: str) -> Iterator[None]:
    """What goes wrong inside is told with the file and line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {where}: {error}") from None
    except RecursionError:
        raise InputError(f"{what}: {where}: lists and objects within one another to a depth of hundreds") from None


def some_of(lines: Sequence[Line[T]], which: Sequence[int]) -> str:
    """Where the first few of these lines stand, in words."""
    return f"{', '.join(lines[i].where for i in which[:_NAMED])}{', …' * (len(which) > _NAMED)}"


def _listed(paths: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths or ()
