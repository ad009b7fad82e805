"""Documents packed into full rows, without leakage.

Documents stand one after another and are cut every L tokens. What lies of one document in one row is a *piece*, and a
piece is an example: it sees neither its neighbours in the row nor the rest of its document.

    row 0 │ a a a a a b b b │      pieces: a[0:5], b[0:3]
    row 1 │ b b c c c c c c │              b[3:5], c[0:6]
    segment │ 2 2 3 3 3 3 3 3 │    positions │ 0 1 0 1 2 3 4 5 │    labels │ b · c c c c c · │

Cost of a draw: a few vectorised numpy calls on its tokens, read from a memory map.

Examples that must stay whole are put into rows by best fit instead (`pack_whole`), which leaves padding at the end of
rows; there, `asked` says which tokens are labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..contracts import Batch, Draw
from ..errors import InputError
from ..noise import rng

IGNORE = -100  # label of a position without one, as in torch's cross-entropy


@dataclass(frozen=True, eq=False)
class PackedSource:
    """Pieces of documents as examples; a `Source`.

    Attributes:
        tokens: [T] all documents' token ids.
        start: [pieces] int64, where each piece begins in `tokens`.
        size: [pieces] int64, its length, 1 … `length`.
        rows: [rows + 1] int64: packed row r holds the pieces rows[r] … rows[r + 1] − 1, together at most `length`.
        length: L, tokens in a row.
        pad: token id for what a draw leaves empty.
        asked: [T] bool, whether a token is a label, of the position before it in its piece; None: all are.
        unit: what each example is alone of, such as ``line``; empty: several may be of one document.
    """

    tokens: NDArray[Any]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    rows: Tensor
    length: int
    pad: int
    asked: NDArray[np.bool_] | None = None
    unit: str = ""

    def __len__(self) -> int:
        return len(self.start)

    def __call__(self, draw: Draw, rng: torch.Generator) -> Batch:
        """The drawn pieces, side by side in the rows that `draw.row` gives them, or one a row.

        Returns:
            int64 columns [R, L]: `input_ids`; `labels`, the token after each one in its piece, −100 at the piece's
            last and where that token is not asked; `position_ids` from 0 in every piece; `segment`, the index of the
            piece in this draw. Padding has label −100 and segment −1, and its positions count on, so that no document
            seems to begin there.

        Raises:
            InputError: the pieces of a row are longer than the row.
        """
        ids = draw.ids.numpy()
        row = np.arange(len(ids)) if draw.row is None else draw.row.numpy()
        shape = int(row[-1]) + 1 if len(row) else 0, self.length
        start, size = self.start[ids], self.size[ids]
        first = np.cumsum(size) - size  # of each piece, in the drawn tokens without padding
        column = first - first[np.searchsorted(row, row)]
        if (column + size > self.length).any():
            raise InputError(f"a draw puts more than {self.length} tokens into one row: its pieces do not fit together")

        piece = np.repeat(np.arange(len(ids)), size)
        within = np.arange(len(piece)) - first[piece]
        at = start[piece] + within
        tokens = self.tokens[at].astype(np.int64)
        labels = np.full(len(tokens), IGNORE, np.int64)
        labels[:-1] = tokens[1:] if self.asked is None else np.where(self.asked[at[1:]], tokens[1:], IGNORE)
        labels[first + size - 1] = IGNORE
        last = np.zeros(shape[0], np.int64)
        last[row] = column  # of the pieces in a row, the last one stays

        place = row[piece] * self.length + column[piece] + within
        columns = {
            "input_ids": (np.full(shape, self.pad, np.int64), tokens),
            "labels": (np.full(shape, IGNORE, np.int64), labels),
            "position_ids": (np.arange(self.length) - last[:, None], within),
            "segment": (np.full(shape, -1, np.int64), piece),
        }
        for whole, drawn in columns.values():
            whole.reshape(-1)[place] = drawn
        return {name: torch.from_numpy(whole) for name, (whole, _) in columns.items()}

    def batches(self, rows: int, limit: int | None = None) -> Iterator[Batch]:
        """The first `limit` packed rows (None: all) in order, `rows` at a time, with `example_id` and `weight`."""
        stop = len(self.rows) - 1 if limit is None else min(limit, len(self.rows) - 1)
        for i in range(0, stop, rows):
            draw = whole_rows(self.rows, torch.arange(i, min(i + rows, stop)))
            yield self(draw, rng(0, 0, "batches")) | {"example_id": draw.ids, "weight": draw.weight}


def whole_rows(first_of: Tensor | None, rows: Tensor) -> Draw:
    """The draw of all examples of some rows, weight 1.

    Args:
        first_of: `Source.rows`: [rows + 1] int64, or None where each example is a row.
        rows: [R] int64, which rows, in the order of the draw.
    """
    if first_of is None:
        return Draw(rows, torch.ones(len(rows)))
    first, number = first_of[rows], first_of[rows + 1] - first_of[rows]
    row = torch.repeat_interleave(number)
    ids = torch.arange(len(row)) + (first - number.cumsum(0) + number)[row]
    return Draw(ids, torch.ones(len(ids)), row)


def pack(
    tokens: NDArray[Any], start: NDArray[np.int64], size: NDArray[np.int64], length: int, pad: int
) -> PackedSource:
    """Cut documents into full rows. What is left over at the end, less than a row, is dropped.

    Args:
        tokens: [T] token ids.
        start, size: [documents], where each document begins in `tokens` and how many it has, in packing order.
        length: L, tokens in a row.
        pad: token id for padding.
    """
    end = np.cumsum(size)  # positions in the row of all documents
    rows = np.arange(int(size.sum()) // length) * length
    stop = len(rows) * length
    begin = end - size
    cuts = np.union1d(begin[begin < stop], rows)  # where pieces begin
    document = np.searchsorted(end, cuts, side="right")  # passes over documents without tokens
    return PackedSource(
        tokens,
        start=start[document] + cuts - begin[document],
        size=np.diff(cuts, append=stop),
        rows=torch.from_numpy(np.append(np.searchsorted(cuts, rows), len(cuts))),
        length=length,
        pad=pad,
    )


def pack_whole(
    tokens: NDArray[Any],
    asked: NDArray[np.bool_],
    start: NDArray[np.int64],
    size: NDArray[np.int64],
    order: NDArray[np.int64],
    length: int,
    pad: int,
    unit: str = "",
) -> PackedSource:
    """Put examples into rows without cutting any, by best fit: longest first, each where the least room is left over.

    Cost: one step of plain Python an example, and sorting.

    Args:
        tokens, asked: [T], see `PackedSource`.
        start, size: [examples], where each begins in `tokens` and how many it has, 1 … `length`.
        order: [examples], decides among equals, and by each row's first example the order of the rows; to be as good as
            random.
        length: L, tokens in a row.
        pad: token id for padding.
        unit: see `PackedSource`.
    """
    rows: list[list[int]] = []
    having: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room left in them
    rooms = 0  # bit r: `having[r]` is not empty
    for example in np.lexsort((order, -size)).tolist():
        need = int(size[example])
        if enough := rooms >> need:
            room = need + (enough & -enough).bit_length() - 1
            row = having[room].pop()
            if not having[room]:
                rooms ^= 1 << room
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(example)
        having[room - need].append(row)
        rooms |= 1 << (room - need)
    rows.sort(key=lambda row: int(order[row[0]]))
    chosen = np.array([example for row in rows for example in row], np.int64)
    ends = np.cumsum([0, *map(len, rows)])
    return PackedSource(tokens, start[chosen], size[chosen], torch.from_numpy(ends), length, pad, asked, unit)
