"""Every example on its own with the same probability, as private training needs it.

    example i is in step s when u_si < q,   q = batch / examples,   u uniform from (secret, s)

A draw has `batch` examples on average and may be empty. Its `size`, what losses are divided by, is `batch`: the number
that was drawn is private. Each example has a row of its own, mostly padding where examples are short.

Sampling makes a step more private only while nobody knows who was drawn. The randomness is therefore not the recipe's
seed but a secret, 63 bits from the operating system; it is part of the run's state, so a resumed run draws as the
uninterrupted one would have. Who has the state in a checkpoint knows the draws; `model/` beside it does not tell.

Cost: a random number an example and step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..catalog import Card
from ..contracts import Draw, Source
from ..errors import InputError
from ..noise import secret, secret_rng
from ..options import Options, option
from ..ranks import all_ints

if TYPE_CHECKING:
    from ..step import Run

CARD = Card(
    id="poisson",
    kind="sampler",
    summary="Every example on its own with probability batch / examples: for private training.",
    paper="Deep Learning with Differential Privacy",
    year=2016,
    equation="example i is drawn when u_i < q; losses are divided by q N, the expected number",
    checked="rate, independence of examples and of steps by chi-square; empty draws through the whole step",
    tags=("privacy", "differential privacy", "dp-sgd", "subsampling"),
)


@dataclass(frozen=True)
class Config(Options):
    """Who may know the draws."""

    seed: int | None = option(
        None,
        "null: one that nobody knows, kept in checkpoints only; a number: repeatable, and the draws are known to "
        "whoever reads the recipe",
        ge=0,
    )


@dataclass
class Poisson:
    """See the module docstring; a `Sampler`.

    Attributes:
        number: examples there are, N.
        rows: examples a step on average.
        secret: where the draws come from.
        secretly: does nobody know it?
    """

    number: int
    rows: int
    secret: int
    secretly: bool

    @property
    def rate(self) -> float:
        """q."""
        return self.rows / self.number

    def check(self, run: Run) -> None:
        """Take the first rank's secret on all."""
        self.secret = all_ints(self.secret, device=run.device)[0][0]

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """About `rows` examples in order, weight 1, one a row."""
        drawn = secret_rng(self.secret, step, "poisson").random(self.number) < self.rate
        ids = torch.from_numpy(drawn.nonzero()[0])
        return Draw(ids, torch.ones(len(ids)), size=self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"secret": self.secret}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.secret = state["secret"]


def build(config: Config, source: Source, rows: int, seed: int) -> Poisson:
    """A sampler that gives `rows` examples of `source` a step on average.

    Raises:
        InputError: no rows a step, or more than there are examples.
    """
    if not 1 <= rows <= len(source):
        raise InputError(f"sampler 'poisson': 'batch' must be 1 to {len(source)}, the examples there are, got {rows}")
    return Poisson(len(source), rows, secret(config.seed), config.seed is None)
