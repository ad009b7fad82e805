"""Which combinations of optimizer, adapter, precision and activation checkpointing fit, best first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch

from ...catalog import entries
from ...errors import InputError
from ...optim.precision import DTYPES, Precision
from ...recipe import Choice
from .activations import PHASES, Moment, Traced
from .forecast import Forecast, Leaf, Setup, default, leaves_of, summed, trace_or_assume

PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "cpu": ("float32",),
    "cuda": ("bfloat16", "bfloat16-stochastic", "float32"),
}
"""Bfloat16 products are slow on most processors."""

TIGHT = 0.9
"""Share of the memory above which a forecast may prove wrong; see docs/plan.md."""

NOTHING = Traced(dict.fromkeys(PHASES, Moment(0, 0)), 0)

ORDER = (
    "first what fits, then what trains all weights, then fewer operations a token (checkpointing repeats the forward), "
    "more rows at a time, less memory; of what does not fit, less memory first"
)


class Row(NamedTuple):
    """A combination.

    Attributes:
        setup: it. forecast: its memory. fits: yes; tight, above `TIGHT` of the memory; no.
    """

    setup: Setup
    forecast: Forecast
    fits: str

    @property
    def work(self) -> float:
        """Operations a token; of an update none."""
        return self.forecast.flops / (self.setup.rows * self.setup.length)

    @property
    def order(self) -> tuple[Any, ...]:
        """See `ORDER`."""
        last = ("yes", "tight", "no").index(self.fits), self.forecast.peak
        if self.fits == "no":
            return last
        return last[0], self.setup.adapter.id != "none", round(self.work, -3), -self.setup.rows, last[1]

    def to_mapping(self) -> dict[str, Any]:
        """Names and bytes, as JSON has them."""
        s, f = self.setup, self.forecast
        return {
            "optimizer": s.optimizer.to_mapping(),
            "adapter": s.adapter.to_mapping(),
            "precision": s.precision,
            "checkpointing": s.options.checkpointing,
            "rows": s.rows,
            "length": s.length,
            "fits": self.fits,
            "peak": round(f.peak),
            "height": f.height,
            "weights": round(f.weights),
            "gradients": round(f.gradients),
            "optimizer_state": round(f.optimizer),
            "roles": {role: {part: round(size) for part, size in parts.items()} for role, parts in f.roles.items()},
            "moments": {p: {"gradients": round(m.gradients), "rest": round(m.rest)} for p, m in f.moments.items()},
            "overhead": round(f.overhead),
            "assumed": f.assumed,
            "flops_per_token": round(self.work),
            "traffic": round(f.traffic),
            "parameters": f.parameters,
            "trained": f.trained,
        }


class Base:
    """What a pass depends on, but for its rows: it is traced when it is asked for."""

    def __init__(self, setup: Setup, parts: tuple[Counter[Leaf], int, int | None]) -> None:
        self.setup = setup
        self.leaves, self.buffers, self.layers = parts
        self._traced: dict[int, tuple[Traced, str]] = {}

    def of(self, rows: int) -> tuple[Traced, str]:
        """The pass of so many rows, and what was assumed."""
        if rows not in self._traced:
            self._traced[rows] = trace_or_assume(replace(self.setup, rows=rows), self.layers)
        return self._traced[rows]


def combinations(first: Setup, *, memory: float, adapters: bool = True) -> list[Row]:
    """Every combination with the number of rows, those of `first` or halved until it fits; best first.

    Args:
        first: model, objective, estimator, length and device are taken from it; so are options of its methods.
        memory: bytes there are. adapters: with those of `beside`, too, or only with that of `first`.

    Raises:
        InputError: none of them is possible.
    """
    rows: list[Row] = []
    refused: InputError | None = None
    groups: dict[torch.dtype, list[Precision]] = {}
    for precision in dict.fromkeys((*PRECISIONS[first.device], first.precision)):
        groups.setdefault(DTYPES[precision], []).append(precision)
    chosen = beside(first.adapter) if adapters else [first.adapter]
    if getattr(first.options, "quantise", None):
        chosen = [adapter for adapter in chosen if adapter.id != "none"]
    for adapter, alike in product(chosen, groups.values()):
        setup = replace(first, adapter=adapter, precision=alike[0])
        try:
            parts = leaves_of(setup)
            for checkpointing in (False, True):
                setup = replace(setup, options=replace(first.options, checkpointing=checkpointing))
                base = Base(setup, parts)
                for precision in alike:
                    rows += list(_optimizers(replace(setup, precision=precision), base, memory))
        except InputError as error:  # such as a model that cannot checkpoint
            refused = error
    if refused is not None and not rows:
        raise refused
    return sorted(rows, key=lambda row: row.order)


def _optimizers(setup: Setup, base: Base, memory: float) -> Iterator[Row]:
    for optimizer in choices(setup.optimizer):
        here = replace(setup, optimizer=optimizer)
        least = summed(here, base.leaves, base.buffers, NOTHING, "").peak  # what stays
        for rows in halves(setup.rows) if least <= memory else (1,):
            here = replace(here, rows=rows, several=setup.several or rows < setup.rows)
            found = summed(here, base.leaves, base.buffers, *base.of(rows))
            fits = verdict(found.peak, memory)
            if fits == "yes" or rows == 1:
                yield Row(here, found, fits)
                break


def halves(rows: int) -> Iterator[int]:
    """A number, half of it, and so on to 1."""
    while rows:
        yield rows
        rows //= 2


def verdict(peak: float, memory: float) -> str:
    """Does it fit?"""
    return "no" if peak > memory else "tight" if peak > TIGHT * memory else "yes"


def beside(given: Choice) -> list[Choice]:
    """The given adapter, none, and a LoRA, for which the others can be taken: a pass is traced for each, seconds for a
    large model, and beside the frozen weights they differ by little."""
    return [given, *(default("adapter", id) for id in ("none", "lora") if id != given.id)]


def choices(given: Choice) -> list[Choice]:
    """The methods of a kind that need no options, and the given one with its own."""
    found = [given]
    for (kind, id), entry in entries().items():
        if kind == given.kind and id != given.id:
            with suppress(InputError):  # an option has no default
                found.append(Choice(kind, id, entry.load().Config.from_mapping({}, id)))
    return found
