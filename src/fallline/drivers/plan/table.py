"""Which combinations of optimizer, adapter, precision and activation checkpointing fit, best first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ...catalog import entries
from ...errors import InputError
from ...optim.precision import DTYPES, Precision
from ...recipe import Choice
from .activations import PHASES, Moment, Traced
from .forecast import Forecast, Leaf, Setup, leaves_of, summed, trace_or_assume

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
    "more rows at a time, less memory"
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
        full = self.setup.adapter.id == "none"
        return (
            ("yes", "tight", "no").index(self.fits),
            not full,
            round(self.work, -3),
            -self.setup.rows,
            self.forecast.peak,
        )

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


def combinations(first: Setup, *, memory: float, batch: int, device: str) -> list[Row]:
    """Every combination with the number of rows, a power of two up to `batch`, that fits; best first.

    Args:
        first: model, objective, estimator and length are taken from it.
        memory: bytes there are. batch: rows of a step. device: ``cpu`` or ``cuda``.
    """
    rows = []
    for adapter in choices("adapter"):
        groups: dict[torch.dtype, list[Precision]] = {}
        for precision in PRECISIONS[device]:
            groups.setdefault(DTYPES[precision], []).append(precision)
        for alike in groups.values():
            setup = replace(first, adapter=adapter, precision=alike[0])
            parts = leaves_of(setup)
            for checkpointing in (False, True):
                setup = replace(setup, options=replace(first.options, checkpointing=checkpointing))
                base = Base(setup, parts)
                for precision in alike:
                    rows += list(_optimizers(replace(setup, precision=precision), base, memory, batch))
    return sorted(rows, key=lambda row: row.order)


def _optimizers(setup: Setup, base: Base, memory: float, batch: int) -> Iterator[Row]:
    for optimizer in choices("optimizer"):
        here = replace(setup, optimizer=optimizer)
        least = summed(here, base.leaves, base.buffers, NOTHING, "").peak  # what stays
        for rows in reversed([1 << k for k in range(batch.bit_length())]) if least <= memory else (1,):
            here = replace(here, rows=rows, several=rows < batch)
            found = summed(here, base.leaves, base.buffers, *base.of(rows))
            fits = verdict(found.peak, memory)
            if fits == "yes" or rows == 1:
                yield Row(here, found, fits)
                break


def verdict(peak: float, memory: float) -> str:
    """Does it fit?"""
    return "no" if peak > memory else "tight" if peak > TIGHT * memory else "yes"


def choices(kind: str) -> list[Choice]:
    """The methods of a kind that need no options."""
    found = []
    for (k, id), entry in entries().items():
        if k == kind:
            try:
                found.append(Choice(kind, id, entry.load().Config.from_mapping({}, id)))
            except InputError:
                continue  # an option has no default
    return found
