"""Plain text files: a document is a file, or a section of a long one.

A long file is cut at line ends into sections of about 16 000 characters, so that one file alone has parts to train on
and parts to hold out. A document's id begins with the path below the folder that was named, below the fixed part of the
pattern, or the file's name: the split does not change when the folder moves.

Cost: the files are read and hashed whole at every start; their tokens are cached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..catalog import Card
from ..errors import InputError
from ..options import option
from .dataset import DataOptions, Dataset, make_dataset
from .documents import Document
from .files import find_files, read_text

CARD = Card(
    id="text",
    kind="data",
    summary="Your own text files: files, folders (*.txt and *.md, recursively) or patterns such as corpus/**/*.rst.",
    needs=("UTF-8 files; whole documents are held out for validation",),
    checked="files, folders, patterns and sections against a slow reference; missing, blank or binary files refused",
    tags=("files", "folder", "glob", "local", "own data", "txt", "markdown"),
)

_WHAT = "data 'text'"

SECTION = 1 << 14
"""Characters in a section of a long file, at least; it ends where the line ends."""


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions):
    """Where the text is, and the common options."""

    path: str | tuple[str, ...] = option(help="files, folders or patterns (** is any depth), one or a list")

    def check(self) -> None:
        if not self.paths() or "" in self.paths():
            raise InputError(f"'path' must name files, folders or patterns, got {self.path!r}")

    def paths(self) -> tuple[str, ...]:
        """`path` as a list."""
        return (self.path,) if isinstance(self.path, str) else self.path


def build(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
    """The files named by `config.path`, packed.

    Raises:
        InputError: a path that is not there or has no text files; a named file that is blank; a file that is not
            UTF-8; too little text.
    """
    return make_dataset(list(read(config.paths())), config, tokenizer, _WHAT)


def read(paths: tuple[str, ...]) -> Iterator[Document]:
    """The documents of all files that `paths` name, each once, in the order of `paths` and then by name."""
    for file in find_files(paths, ("txt", "md"), _WHAT):
        text = read_text(file.path, _WHAT)
        if not text.strip() and file.itself:
            raise InputError(f"{_WHAT}: the file {file.path} is empty or blank")
        yield from sections(file.id, text)


def sections(id: str, text: str) -> Iterator[Document]:
    """A file as documents: `id` when it is short, else its sections ``id#0``, ``id#1``, …"""
    if len(text) <= 2 * SECTION:
        yield Document(id, text)
        return
    start, number = 0, 0
    while start < len(text):
        end = text.find("\n", start + SECTION) + 1
        if end == 0 or len(text) - end < SECTION:  # what is left is no section of its own
            end = len(text)
        yield Document(f"{id}#{number}", text[start:end])
        start, number = end, number + 1
