"""Every packed row once an epoch, in an order drawn anew for each epoch.

    rows of step s = π₀ π₁ π₂ …  at positions s·R … (s + 1)·R − 1,   π_e a random permutation from (seed, e)

Epochs follow one another without a gap, so a step may hold the end of one and the beginning of the next. The draw is a
function of seed and step alone: there is no state to save.

Cost: one permutation of the rows an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    summary="Every packed row once an epoch, in random order.",
    checked="every row once an epoch across steps; equal draws from any step without history",
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
    """

    number: int
    rows: int
    seed: int
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
            order = torch.randperm(self.number, generator=rng(self.seed, epoch, "sampler/epoch"))
            self._latest = epoch, order
        return self._latest[1]


@dataclass
class Uniform:
    """All examples of the rows of `epochs`, weight 1; a `Sampler`.

    Attributes:
        source: whose rows.
        epochs: which of them.
    """

    source: Source
    epochs: Epochs

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        return whole_rows(self.source.rows, self.epochs(step))


def build(config: Config, source: Source, rows: int, seed: int) -> Uniform:
    """A sampler that gives `rows` packed rows of `source` a step.

    Raises:
        InputError: no rows a step.
    """
    check_rows(rows)
    return Uniform(source, Epochs(number_of_rows(source), rows, seed))


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
