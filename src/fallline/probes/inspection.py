"""Inspections: what they are shown of a trained model, and what they answer.

An inspection asks a question of a model that is done. What it is shown is a `Subject`, whichever way the model was
stored; what it answers are `Findings`, which are drawn as a table, a page and JSON by whoever asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Changed(NamedTuple):
    """A linear layer that training has changed.

    Attributes:
        path: of the layer. before, after: its weight [m, n], in at least float32.
    """

    path: str
    before: Tensor
    after: Tensor


class Prompt(NamedTuple):
    """A line of a file of prompts, as the model is asked it.

    Attributes:
        where: ``FILE:LINE``. text: in the model's template, up to where it answers. ids: that as tokens. completion:
            the right answer, where the line has one.
    """

    where: str
    text: str
    ids: list[int]
    completion: str | None


class Subject(Protocol):
    """A trained model beside the one it was made from.

    Attributes:
        name: what it was opened by. model: the trained one, in evaluation mode. tokenizer: of it.
    """

    name: str
    model: Any
    tokenizer: Any

    def changed(self) -> Iterator[Changed]:
        """The linear layers that training has changed, but for the head, one at a time, in the model's order."""
        ...

    def scaled(self, factor: float) -> AbstractContextManager[None]:
        """Inside, `model` has the weights W₀ + λ (W₁ − W₀): at 0 the base, at 1 the trained ones, to the bit."""
        ...

    def prompts(self, paths: str | Sequence[str], what: str) -> list[Prompt]:
        """The prompts of JSON Lines. `what`: the option that names them, for errors.

        Raises:
            InputError: a path or line that cannot be used, or nothing in it.
        """
        ...

    def openings(self, prompt: Prompt, answers: Sequence[str]) -> set[int]:
        """The tokens with which these answers would begin after a prompt."""
        ...


class Table(NamedTuple):
    """Cells as people read them; the first column names the row."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    note: str = ""


class Chart(NamedTuple):
    """Curves over a common x. `ends`: of the y axis, None: where the curves end.

    Attributes:
        curves: name → (x, y).
    """

    title: str
    x: str
    y: str
    curves: dict[str, tuple[list[float], list[float]]]
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Findings:
    """What an inspection found.

    Attributes:
        question: that was asked, the page's title.
        remarks: the answer, and what to keep in mind, in sentences.
        tables: the first is also shown on the terminal. charts: below it.
        found: all figures, as JSON takes them.
    """

    question: str
    remarks: list[str]
    tables: list[Table]
    charts: list[Chart] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)


class Inspection(Protocol):
    """A question with its options."""

    def look(self, subject: Subject) -> Findings:
        """
        Raises:
            InputError: it cannot be asked of this model.
            NonFiniteError: the model's weights or answers are not finite.
        """
        ...
