"""Which tokens belong to which example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Spans:
    """Examples as spans of a list of N tokens.

    Attributes:
        ends: example b has the tokens ends[b][0] … ends[b][1] − 1.
        even: T, where the examples are equally long and follow one another without a gap; else None.
        tokens: N.
        device: of `owner`.
    """

    ends: tuple[tuple[int, int], ...]
    even: int | None
    tokens: int
    device: torch.device

    @property
    def number(self) -> int:
        """B."""
        return len(self.ends)

    @property
    def mean(self) -> float:
        """Tokens of an example."""
        return sum(stop - start for start, stop in self.ends) / max(1, self.number)

    @cached_property
    def owner(self) -> Tensor:
        """[N] int64: each token's example, B for a token of nobody's."""
        if self.even is not None:
            return torch.arange(self.number, device=self.device).repeat_interleave(self.even)
        found = torch.full((self.tokens,), self.number)
        for b, (start, stop) in enumerate(self.ends):
            found[start:stop] = b
        return found.to(self.device)

    def spread(self, values: Tensor) -> Tensor:
        """Each token's example's value, [N] from [B]; 0 for a token of nobody's."""
        return torch.cat([values, values.new_zeros(1)])[self.owner]

    def sums(self, values: Tensor) -> Tensor:
        """Token values summed into examples, [B, …] from [N, …]."""
        if self.even is not None:
            return values.view(self.number, self.even, *values.shape[1:]).sum(1)
        found = values.new_zeros(self.number + 1, *values.shape[1:])
        return found.index_add_(0, self.owner, values)[:-1]

    def some(self, kept: Tensor) -> Spans:
        """The spans of a list with only some tokens. kept: [n] int64, which, ascending. Waits for the device."""
        counts = torch.bincount(self.owner[kept], minlength=self.number + 1)
        if int(counts[-1]):
            raise InputError("a token that belongs to no example has a label")
        return lengths(counts[:-1].tolist(), self.device)


def lengths(sizes: list[int], device: torch.device) -> Spans:
    """Examples of these sizes, one after another."""
    ends, at = [], 0
    for size in sizes:
        ends.append((at, at + size))
        at += size
    even = sizes[0] if sizes and len(set(sizes)) == 1 else None
    return Spans(tuple(ends), even, at, device)


@dataclass(frozen=True)
class Layout:
    """How a batch's examples lie in its rows.

    Attributes:
        rows: R. examples: B.
        length: L, tokens in a row, where it is known; always of a packed batch.
        packed: the spans of a packed batch's R · L tokens; None where row b is example b.
        device: where the gradients are.
    """

    rows: int
    examples: int
    length: int | None
    packed: Spans | None
    device: torch.device

    def spans(self, tokens: int) -> Spans:
        """The examples among `tokens` tokens, all rows' one after another."""
        if self.packed is not None:
            return self.packed
        each = tokens // max(1, self.rows)
        if each * self.rows != tokens:
            raise InputError(f"per-example gradients: {tokens} tokens cannot be parted into {self.rows} rows")
        return Spans(tuple((b * each, (b + 1) * each) for b in range(self.rows)), each, tokens, self.device)

    def fits(self, shape: torch.Size) -> bool:
        """Can a layer's input of this shape, features last, be parted into examples? [R, …, d], or all tokens of the
        batch one after another [R · L, d]."""
        if len(shape) == 2 and self.length is not None and shape[0] == self.rows * self.length:
            return True
        if self.packed is not None:
            return tuple(shape[:2]) == (self.rows, self.length)
        return shape[0] == self.rows


def layout(batch: Mapping[str, Tensor] | int, device: torch.device) -> Layout:
    """The layout of a batch with `example_id`, perhaps `input_ids` [R, L], and, when packed, `segment` [R, L]; or of B
    rows.

    Raises:
        InputError: a packed example's tokens do not lie together.
    """
    if isinstance(batch, int):
        return Layout(batch, batch, None, None, device)
    number = len(batch["example_id"])
    if "segment" not in batch:
        length = batch["input_ids"].shape[1] if "input_ids" in batch else None
        return Layout(number, number, length, None, device)
    segment = batch["segment"]
    ids, sizes = segment.flatten().cpu().unique_consecutive(return_counts=True)
    stop = sizes.cumsum(0)
    ends = [(0, 0)] * number
    seen: set[int] = set()
    for b, first, last in zip(ids.tolist(), (stop - sizes).tolist(), stop.tolist(), strict=True):
        if b in seen and b >= 0:
            raise InputError(f"the tokens of example {b} of a packed batch do not lie together")
        seen.add(b)
        if b >= 0:
            ends[b] = (first, last)
    spans = Spans(tuple(ends), None, segment.numel(), device)
    return Layout(len(segment), number, segment.shape[1], spans, device)
