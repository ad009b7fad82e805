"""Cutting a batch into micro-batches: whole rows, whole groups, and the examples that lie in them."""

from __future__ import annotations

from itertools import pairwise

import torch

from .contracts import Batch, Draw, Source
from .errors import InputError
from .noise import rng


def no_rows(source: Source) -> Batch:
    """A batch of none of a source's examples: which columns there are, before any is drawn."""
    return source(Draw(torch.zeros(0, dtype=torch.int64), torch.zeros(0)), rng(0, 0, "no rows"))


def starts(batch: Batch) -> list[int]:
    """[R + 1]: row r of a batch holds the examples starts[r] … starts[r + 1] − 1. One host sync when packed."""
    n = len(batch["example_id"])
    if "segment" not in batch:
        return list(range(n + 1))
    rows = len(batch["segment"])
    upto = (batch["segment"].amax(1).cummax(0).values + 1).tolist() if rows else []
    return [0, *upto[:-1], n][: rows + 1]  # the last row takes examples that have no token left


def split(batch: Batch, micro: int) -> list[Batch]:
    """Micro-batches of at most `micro` rows; examples with a common `group_id` stay together.

    Raises:
        InputError: a group has more rows than `micro`, or does not lie together.
    """
    at = starts(batch)
    n = len(at) - 1
    if n <= micro:
        return [batch] if n else []
    borders = _borders(batch["group_id"].tolist(), at) if "group_id" in batch else range(1, n + 1)
    cuts, previous = [0], 0
    for border in borders:
        if border - previous > micro:
            raise InputError(f"a group of {border - previous} rows does not fit a micro-batch of {micro}; raise micro")
        if border - cuts[-1] > micro:
            cuts.append(previous)
        previous = border
    cuts.append(n)
    return [_cut(batch, a, b, at[a], at[b]) for a, b in pairwise(cuts)]


def _borders(group: list[int], at: list[int]) -> list[int]:
    """The rows before which a batch may be cut, and its end."""
    new = [i == 0 or group[i] != group[i - 1] for i in range(len(group))]
    if sum(new) != len(set(group)):
        raise InputError("examples of one group_id must lie next to each other in the batch")
    rows = len(at) - 1
    return [r for r in range(1, rows) if at[r] == len(group) or new[at[r]]] + [rows]


def _cut(batch: Batch, start: int, stop: int, first: int, last: int) -> Batch:
    """Rows start … stop − 1, which hold the examples first … last − 1."""
    if "segment" not in batch:
        return {k: v[start:stop] for k, v in batch.items()}
    segment = batch["segment"]
    part = {k: v[start:stop] if v.shape[:2] == segment.shape else v[first:last] for k, v in batch.items()}
    kept = part["segment"]
    return part | {"segment": torch.where(kept < 0, kept, kept - first)}
