"""Every packed row once an epoch, in an order drawn anew for each epoch.

    rows of step s = π₀ π₁ π₂ …  at positions s·R … (s + 1)·R − 1,   π_e a random permutation from (seed, e)

Epochs follow one another without a gap, so a step may hold the end of one and the beginning of the next. The draw is a
function of seed and step alone: there is no state to save.

Where the source has streams, each has epochs of its own, drawn independently, and every step the same number of its
rows: the share that the source states, rounded to whole rows, at least one.

Cost: one permutation of the rows an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..catalog import Card
from ..contracts import Draw, Source
from ..errors import InputError
from ..noise import rng
from ..options import Options
from .packed import whole_rows

CARD = Card(
    id="uniform",
    kind="sampler",
    summary="Every packed row once an epoch, in random order; of each stream by itself.",
    checked="every row once an epoch across steps; equal draws from any step without history; shares of streams",
    tags=("shuffle", "epoch", "without replacement", "random reshuffling"),
)


@dataclass(frozen=True)
class Config(Options):
    """No options."""


@dataclass
class Epochs:
    """Which rows each step takes, so that every row comes once an epoch; see the module docstring.

    Attributes:
        number: of rows there are.
        rows: R, packed rows a step.
        seed: of the run.
        stream: whose rows, where there are several streams.
    """

    number: int
    rows: int
    seed: int
    stream: str = ""
    _latest: tuple[int, Tensor] = field(default=(-1, torch.empty(0)), init=False, repr=False)

    def __call__(self, step: int) -> Tensor:
        """[R] int64, 0 … `number` − 1."""
        at, stop, rows = step * self.rows, (step + 1) * self.rows, []
        while at < stop:
            epoch, place = divmod(at, self.number)
            rows.append(self._order(epoch)[place : place + stop - at])
            at += len(rows[-1])
        return torch.cat(rows)

    def _order(self, epoch: int) -> Tensor:
        if self._latest[0] != epoch:
            name = f"sampler/epoch/{self.stream}" if self.stream else "sampler/epoch"
            order = torch.randperm(self.number, generator=rng(self.seed, epoch, name))
            self._latest = epoch, order
        return self._latest[1]


@dataclass
class Streams:
    """The rows of several streams in each step, stream by stream.

    Attributes:
        parts: where the rows of each stream begin, and which of them a step takes.
    """

    parts: Sequence[tuple[int, Epochs]]

    def __call__(self, step: int) -> Tensor:
        """[R] int64."""
        return torch.cat([first + epochs(step) for first, epochs in self.parts])


@dataclass
class Uniform:
    """All examples of the rows of `epochs`, weight 1; a `Sampler`.

    Attributes:
        source: whose rows.
        epochs: which of them.
    """

    by_stream: ClassVar[bool] = True  # every step has the stated share of each

    source: Source
    epochs: Epochs | Streams

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        return whole_rows(self.source.rows, self.epochs(step))


def build(config: Config, source: Source, rows: int, seed: int) -> Uniform:
    """A sampler that gives `rows` packed rows of `source` a step.

    Raises:
        InputError: no rows a step, or fewer than there are streams.
    """
    check_rows(rows)
    streams = getattr(source, "streams", ())
    if len(streams) < 2:
        return Uniform(source, Epochs(number_of_rows(source), rows, seed))
    if rows < len(streams):
        names = ", ".join(stream.name for stream in streams)
        raise InputError(f"a step needs a row of each stream ({names}): 'batch' at least {len(streams)}, got {rows}")
    dealt = deal(rows, [stream.share for stream in streams])
    return Uniform(
        source,
        Streams([(s.first, Epochs(s.stop - s.first, n, seed, s.name)) for s, n in zip(streams, dealt, strict=True)]),
    )


def deal(rows: int, shares: Sequence[float]) -> list[int]:
    """How many of `rows` each share is: at least one, and each further one to whoever lacks most."""
    dealt = [1] * len(shares)
    for _ in range(rows - len(shares)):
        lacks = [share * rows - have for share, have in zip(shares, dealt, strict=True)]
        dealt[lacks.index(max(lacks))] += 1
    return dealt


def check_rows(rows: int) -> None:
    """Refuse a step of nothing.

    Raises:
        InputError: no rows a step.
    """
    if rows < 1:
        raise InputError(f"a step needs at least 1 row, got {rows}")


def number_of_rows(source: Source) -> int:
    """Packed rows, or examples where each is a row."""
    return len(source) if source.rows is None else len(source.rows) - 1
