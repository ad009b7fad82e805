"""Examples that are two sequences, such as a chosen and a rejected answer with their prompt, in packed rows.

    tokens    │ a a a a A A A b b b B B · · │    small letters: the first sequence, capitals: the second
    segment   │ 0 0 0 0 0 0 0 1 1 1 1 1 − − │
    side      │ 0 0 0 0 1 1 1 0 0 0 1 1 − − │
    positions │ 0 1 2 3 0 1 2 0 1 2 0 1 2 3 │

Both are one example: they have its index in `segment`, lie together in one row, and are told apart by `side`. So rows,
micro-batches, ranks and whatever asks about single examples handle a pair like any other example. Each sequence begins
at position 0, hence neither sees the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..contracts import Batch, Draw
from .packed import PackedSource, pack_whole


@dataclass(frozen=True, eq=False)
class PairedSource(PackedSource):
    """Pairs of sequences as examples; a `Source`.

    Attributes:
        second: [pieces] int64, how many tokens of each example are of its first sequence; `size` where it has only one.
            The first token of a sequence must not be asked: nothing comes before it.
    """

    second: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __call__(self, draw: Draw, rng: torch.Generator) -> Batch:
        """As `PackedSource`; `position_ids` begin at 0 in every sequence.

        Returns:
            Also `side` [R, L] int64: 0 in an example's first sequence, 1 in its second, −1 in padding.
        """
        batch = super().__call__(draw, rng)
        segment, position = batch["segment"], batch["position_ids"]
        if not len(draw.ids):
            return batch | {"side": segment.clone()}
        near = segment.cummax(1).values.clamp(min=0)  # padding counts on from the example before it
        begin = torch.from_numpy(self.second[draw.ids.numpy()])[near]
        side = (position >= begin).long()
        batch["position_ids"] = position - side * begin
        return batch | {"side": side.masked_fill(segment < 0, -1)}


def pack_pairs(
    tokens: NDArray[np.uint32],
    asked: NDArray[np.bool_],
    start: NDArray[np.int64],
    size: NDArray[np.int64],
    second: NDArray[np.int64],
    order: NDArray[np.int64],
    length: int,
    pad: int,
    unit: str = "",
) -> PairedSource:
    """Put pairs into rows without cutting any, see `pack_whole`.

    Args:
        tokens, asked, size, order, length, pad, unit: as there.
        start: [examples], ascending.
        second: [examples], see `PairedSource`.
    """
    packed = pack_whole(tokens, asked, start, size, order, length, pad, unit)
    inner = second[np.searchsorted(start, packed.start)]
    return PairedSource(tokens, packed.start, packed.size, packed.rows, length, pad, asked, unit, inner)
