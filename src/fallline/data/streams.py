"""Streams: examples of several kinds, such as what to forget and what to keep, of which every step takes its share.

Each packed row holds examples of one stream, and the rows of a stream lie together, so that a sampler that goes by rows
can take so many of each (`uniform`). Objectives tell streams apart by the column `domain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..contracts import Batch, Draw
from .paired import PairedSource


class Stream(NamedTuple):
    """Rows `first` … `stop` − 1 of a source, of which a step's rows shall have the share `share`."""

    name: str
    first: int
    stop: int
    share: float


@dataclass(frozen=True, eq=False)
class StreamedSource(PairedSource):
    """A `PairedSource` of several streams.

    Attributes:
        domain: [pieces] int64, the stream of each example.
        streams: where their rows are; empty where rows of different streams alternate.
    """

    domain: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    streams: tuple[Stream, ...] = ()

    @property
    def paired(self) -> bool:
        """Has any example two sequences?"""
        return bool((self.second < self.size).any())

    def __call__(self, draw: Draw, rng: torch.Generator) -> Batch:
        """As `PairedSource`, with `domain` [B] int64."""
        return super().__call__(draw, rng) | {"domain": torch.from_numpy(self.domain[draw.ids.numpy()])}


class Part(NamedTuple):
    """A stream by itself; `domain` is its number in the column."""

    name: str
    domain: int
    share: float
    source: PairedSource


def joined(parts: Sequence[Part], alternating: bool = False) -> StreamedSource:
    """Streams as one source.

    Args:
        parts: all of the same tokens, length and padding; those without rows are left out.
        alternating: mix the rows evenly, so that the first few have their share of every stream: to evaluate on.
    """
    parts = [part for part in parts if len(part.source)]
    first = parts[0].source
    places = []
    for number, part in enumerate(parts):
        rows = len(part.source.rows) - 1
        places += [((r + 0.5) / rows if alternating else number, number, r) for r in range(rows)]
    start, size, second, domain, ends = [], [], [], [], [0]
    for _, number, r in sorted(places):
        _, code, _, source = parts[number]
        pieces = slice(int(source.rows[r]), int(source.rows[r + 1]))
        start.append(source.start[pieces])
        size.append(source.size[pieces])
        second.append(source.second[pieces])
        domain.append(np.full(len(start[-1]), code, np.int64))
        ends.append(ends[-1] + len(start[-1]))
    upto = np.cumsum([0, *(len(part.source.rows) - 1 for part in parts)]).tolist()
    unit = first.unit if all(part.source.unit == first.unit for part in parts) else ""
    streams = tuple(Stream(p.name, a, b, p.share) for p, a, b in zip(parts, upto, upto[1:], strict=False))
    return StreamedSource(
        first.tokens, np.concatenate(start), np.concatenate(size), torch.tensor(ends), first.length, first.pad,
        first.asked, unit, np.concatenate(second), np.concatenate(domain), () if alternating else streams,
    )  # fmt: skip
