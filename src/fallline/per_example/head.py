"""The per-example gradients of a vocabulary head, chunk by chunk of tokens, without full logits.

The chunked cross-entropy visits the head's output gradients g [c, V] while a chunk is there. Where norms are all that
is asked, they are taken then, each example's gradient [V, D] existing for a moment or, for short examples, not at all;
a head that is also the embedding keeps of each example the rows of its tokens, T · D numbers, from which the cross
terms follow exactly. Otherwise factors [T, V] or products [V, D] are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .forms import Grams, Outer, Pair, Whole, blocks, keep_factors, squares, wide
from .joined import Summed
from .layout import Spans
from .watch import Use, Watch, watching


class Piece(NamedTuple):
    """A chunk of tokens: of whole examples, or of one example that is longer than a chunk.

    Attributes:
        tokens: which. first, last: the examples first … last − 1. whole: are they whole?
        begins, ends: of one that is not whole, is this its first piece, its last?
    """

    tokens: slice
    first: int
    last: int
    whole: bool = True
    begins: bool = True
    ends: bool = True


def pieces(spans: Spans, size: int) -> list[Piece]:
    """All tokens in pieces of at most `size`, but for tokens of nobody's, which go with their neighbours."""
    found: list[Piece] = []
    at, first, reached = 0, 0, 0
    for b, (_, stop) in enumerate(spans.ends):
        stop = max(stop, reached)
        if stop - at > size and b > first:
            found.append(Piece(slice(at, reached), first, b))
            at, first = reached, b
        if stop - at > size:
            for start in range(at, stop, size):
                end = min(start + size, stop)
                found.append(Piece(slice(start, end), b, b + 1, False, start == at, end == stop))
            at = stop
            first = b + 1
        reached = stop
    if at < spans.tokens or first < spans.number:
        found.append(Piece(slice(at, spans.tokens), first, spans.number))
    return found


class HeadGradients:
    """One use of a head in a watched forward."""

    def __init__(self, watch: Watch, weight: Use | None, bias: Use | None) -> None:
        self.watch, self.weight, self.bias = watch, weight, bias

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> HeadGradients | None:
        """For a head of the model that is being watched; None where nothing of it is."""
        watch = watching()
        if watch is None:
            return None
        uses = watch.use(weight), None if bias is None else watch.use(bias)
        return None if uses == (None, None) else cls(watch, *uses)

    def collect(self, hidden: Tensor, words: int, spans: Spans) -> Collector:
        """For one pass over the chunks."""
        return Collector(self, hidden, words, spans)


class Collector:
    """See the module docstring."""

    def __init__(self, head: HeadGradients, hidden: Tensor, words: int, spans: Spans) -> None:
        self.head, self.spans = head, spans
        (tokens, features), number = hidden.shape, spans.number
        sums = wide(hidden.dtype)
        self.b = hidden.new_zeros(number, words, dtype=sums) if head.bias is not None else None
        self.squared = self.total = self.A = self.G = self.V = None
        self.embedded: list[Use] = []
        if head.weight is None:
            return
        if head.watch.sums_only:
            self.squared = hidden.new_zeros(number, dtype=sums)
            self.total = hidden.new_zeros(words, features, dtype=sums)
            self.embedded = head.watch.embeddings(head.weight.name)
            for use in self.embedded:
                use.head = hidden.new_zeros(use.ids.numel(), features, dtype=sums)
        elif keep_factors(spans.mean, words, features):
            self.A, self.G = torch.empty_like(hidden), hidden.new_empty(tokens, words)
        else:
            self.V = hidden.new_zeros(number, words, features)

    def visit(self, piece: Piece, g: Tensor, x: Tensor, upstream: Tensor) -> None:
        """A chunk: output gradients g [c, V] for upstream 1, inputs x [c, D], upstream [c, 1]."""
        if piece.first == piece.last:
            return  # tokens of nobody's
        start = piece.tokens.start
        ends = [(i - start, j - start) for i, j in self.spans.ends[piece.first : piece.last]]
        if not piece.whole:
            ends = [(0, len(g))]
        ends = [(max(i, 0), max(j, 0)) for i, j in ends]
        if self.b is not None:
            for b, (i, j) in enumerate(ends, piece.first):
                self.b[b] += (upstream[i:j].t().to(g.dtype) @ g[i:j]).squeeze(0)
        if self.head.weight is None:
            return
        A = (upstream * x).to(x.dtype)
        if self.A is not None and self.G is not None:
            self.A[piece.tokens] = A
            if g.data_ptr() != self.G[piece.tokens].data_ptr():
                self.G[piece.tokens] = g
        elif self.V is not None:
            for b, (i, j) in enumerate(ends, piece.first):
                self.V[b].addmm_(g[i:j].t(), A[i:j])
        else:
            self._sum(piece, ends, A, g)

    def _sum(self, piece: Piece, ends: list[tuple[int, int]], A: Tensor, g: Tensor) -> None:
        assert self.squared is not None
        assert self.total is not None
        for use in self.embedded:
            for b, (i, j) in enumerate(ends, piece.first):
                own = slice(*use.spans.ends[b])
                head: Any = use.head
                head[own] += g[i:j][:, use.ids.flatten()[own]].t() @ A[i:j]
        scratch = self.head.watch.scratch
        if not piece.whole:
            mine = scratch.take(tuple(self.total.shape), self.total.dtype)
            if piece.begins:
                mine.zero_()
            mine.addmm_(g.t().to(mine.dtype), A.to(mine.dtype))
            if piece.ends:
                self.squared[piece.first] = mine.square().sum()
                self.total += mine
            return
        even = {j - i for i, j in ends}
        length = (
            even.pop() if len(even) == 1 and ends[-1][1] - ends[0][0] == len(ends) * (ends[0][1] - ends[0][0]) else None
        )
        if length is not None:
            A, g = A[ends[0][0] : ends[-1][1]], g[ends[0][0] : ends[-1][1]]
        outer = Outer((Pair(A, g, Spans(tuple(ends), length, len(A), A.device)),), Grams())
        some = slice(piece.first, piece.last)
        if outer.gram_pays:
            self.squared[some] = outer.squared().to(self.squared.dtype)
            if self.total.dtype == A.dtype:
                self.total.addmm_(g.t(), A)
            else:
                self.total += g.t() @ A
            return
        for rows, block in blocks(outer, len(ends), g.dtype, scratch):
            self.squared[some] += squares(block)
            self.total[rows] += block.sum(0)

    def arrive(self) -> None:
        """All chunks are through, and the gradients are those of the loss."""
        weight, bias = self.head.weight, self.head.bias
        if bias is not None and self.b is not None:
            bias.whole(self.b.unsqueeze(1))
        if weight is None:
            return
        if self.A is not None and self.G is not None:
            weight.arrive(Outer((Pair(self.A, self.G, self.spans),), Grams()))
        elif self.V is not None:
            weight.arrive(Whole(self.V))
        elif self.squared is not None and self.total is not None:
            weight.arrive(Summed(self.squared, self.total))
