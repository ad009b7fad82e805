"""Which files a path names, and what is in them as text."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError


class File(NamedTuple):
    """A file that was found.

    Attributes:
        id: its path below the folder that was named or below the fixed part of the pattern, or its name: it does not
            change when the folder moves.
        path: where it is.
        itself: it was named, rather than found in a folder or by a pattern.
    """

    id: str
    path: Path
    itself: bool


def find_files(paths: Sequence[str], endings: Sequence[str], what: str) -> Iterator[File]:
    """All files that `paths` name, each once, in the order of `paths` and then by id.

    Args:
        paths: files, folders, or patterns in which ``**`` is any depth.
        endings: of the files that are taken from a folder, at any depth.
        what: how to name the source in an error, such as ``data 'text'``.

    Raises:
        InputError: a path that is not there, or that names no files.
    """
    seen = set()
    for named in paths:
        for file in _named(named, endings, what):
            if file.path.resolve() not in seen:
                seen.add(file.path.resolve())
                yield file


def read_text(path: Path, what: str) -> str:
    """A file's text, without its byte order mark.

    Raises:
        InputError: the file cannot be read or is not UTF-8.
    """
    return _decoded(_bytes(path, what), str(path), what)


def read_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """A file's lines with their numbers from 1, as `read_text` would read them; only a line feed ends a line.

    Raises:
        InputError: the file cannot be read, or a line, which is named, is not UTF-8.
    """
    for number, raw in enumerate(_bytes(path, what).split(b"\n"), 1):
        yield number, _decoded(raw, f"{path}:{number}", what)


def _named(named: str, endings: Sequence[str], what: str) -> list[File]:
    """The files of one entry of `paths`, sorted by id."""
    path = Path(named).expanduser()
    if os.path.isfile(path):  # unlike Path.is_file, False for whatever cannot be asked
        return [File(path.name, path, True)]
    if os.path.isdir(path):
        root, patterns = path, [f"{glob.escape(str(path))}/**/*.{ending}" for ending in endings]
    elif glob.has_magic(named):
        root, patterns = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts)), [str(path)]
    else:
        raise InputError(f"{what}: there is no file or folder {named!r} (from {Path.cwd()})")
    found = {Path(name) for pattern in patterns for name in glob.iglob(pattern, recursive=True)}
    files = sorted(File(file.relative_to(root).as_posix(), file, False) for file in found if os.path.isfile(file))
    if not files:
        kinds = " or ".join(f"*.{ending}" for ending in endings)
        sought = f"{kinds} file in the folder" if os.path.isdir(path) else "file that matches"
        raise InputError(f"{what}: there is no {sought} {named!r} (from {Path.cwd()})")
    return files


def _bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{what}: cannot read {path}: {error.strerror}") from None


def _decoded(raw: bytes, where: str, what: str) -> str:
    wrong = raw.find(b"\0")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        wrong = error.start if wrong < 0 else min(wrong, error.start)
    if wrong >= 0:
        raise InputError(
            f"{what}: {where} is not UTF-8 text: byte 0x{raw[wrong]:02x} at offset {wrong}; convert or remove it"
        )
    return text.removeprefix("\ufeff")
