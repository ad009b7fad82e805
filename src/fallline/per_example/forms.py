"""Per-example gradients of one parameter, in the form they arise in.

A parameter is seen as a matrix [m, n]; B examples. A form knows each example's squared norm, the weighted sum over
examples, and gives the gradients themselves in blocks of rows.

- `Outer`: a linear layer's, G_bᵀ A_b from the layer's inputs A_b [T, n] and its outputs' gradients G_b [T, m]. The
  squared norm is ‖G_bᵀ A_b‖², 2 T m n operations, or Σ_ts (a_t·a_s)(g_t·g_s) from Gram matrices, 2 T² (m + n).
- `Rows`: an embedding's, where each token adds to one row.
- `Whole`: as they are, [B, m, n].

Of a parameter that is used several times: `joined.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .layout import Spans

BLOCK_BYTES = 16 << 20
"""Most bytes of a block of per-example gradients. From trial runs on CPU that were not kept: larger gained nothing."""

GRAM_BELOW = 40
"""Norms of T tokens' factors come from Gram matrices where T² (m + n) is less than this many times m n, else from the
product: that costs next to nothing beyond the sum over examples, which is due anyway, but the memory it passes through,
so what counts is the Gram matrices' operations for each of its numbers. From trial runs on CPU that were not kept."""

ROUNDING = 4
"""What norms from Gram matrices may lose, in units of eps (Σ_t ‖a_t‖ ‖g_t‖)²; with room for the sum formed later."""

PRODUCT_FROM = 0.5
"""Products are kept in place of factors where those take at least this share of their memory: with a product there,
norm and weighted sum cost nothing more."""


class Form(Protocol):
    """See the module docstring."""

    @property
    def shape(self) -> tuple[int, int]:
        """m, n."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradients."""

    def kept(self) -> Form:
        """What to keep for a weighted sum: the same, or its product."""

    def squared(self, bound: bool = False) -> Tensor:
        """[B], in at least float32. `bound`: not less than the truth, though rounding may have cancelled it."""

    def total(self, weight: Tensor | None) -> Tensor:
        """Σ_b weight_b g_b, [m, n]; None: all one."""

    def block(self, rows: slice, out: Tensor) -> Tensor:
        """The given rows of all examples' gradients, [B, r, n], written to `out`, or where they lie already."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.promote_types(dtype, torch.float32)


def squares(block: Tensor) -> Tensor:
    """[B], the squared norms of [B, …, n]. Row by row: of millions at once, float32 loses the third digit."""
    return torch.linalg.vector_norm(block, dim=-1, dtype=wide(block.dtype)).square().flatten(1).sum(1)


def blocks(form: Form, number: int, dtype: torch.dtype, scratch: Scratch) -> Iterator[tuple[slice, Tensor]]:
    """All gradients of `number` examples, a block of rows at a time; a block is gone when the next one is there."""
    m, n = form.shape
    row_bytes = max(1, number * n * dtype.itemsize)
    step = max(1, min(m, BLOCK_BYTES // row_bytes))
    for first in range(0, m, step):
        rows = slice(first, min(m, first + step))
        yield rows, form.block(rows, scratch.take((number, rows.stop - first, n), dtype))


class Scratch:
    """Memory that one block after another is written to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[torch.dtype, Tensor] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, valid until the next call."""
        size = torch.Size(shape).numel()
        held = self._held.get(dtype)
        if held is None or held.numel() < size:
            self._held[dtype] = held = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)


class Pair(NamedTuple):
    """One use of a linear layer: inputs A [N, n], outputs' gradients G [N, m], and whose tokens they are."""

    A: Tensor
    G: Tensor
    spans: Spans


def gram_pays(tokens: float, m: int, n: int) -> bool:
    """Do Gram matrices of that many tokens give norms sooner than the product [m, n]?"""
    return tokens**2 * (m + n) < GRAM_BELOW * m * n


def keep_factors(tokens: float, m: int, n: int) -> bool:
    """Factors of that many tokens, or the product [m, n], for a weighted sum?"""
    share = tokens * (m + n) / (m * n)
    return share < (1 if gram_pays(tokens, m, n) else PRODUCT_FROM)


class Grams:
    """A Aᵀ of the latest inputs A [B, T, n]: layers side by side, such as query, key and value, have the same."""

    def __init__(self) -> None:
        self._latest: tuple[Tensor, Tensor] | None = None

    def of(self, A: Tensor) -> Tensor:
        """[B, T, T]."""
        if self._latest is not None:
            held, gram = self._latest
            if held.data_ptr() == A.data_ptr() and held.shape == A.shape and held.stride() == A.stride():
                return gram
        gram = torch.bmm(A, A.transpose(1, 2))
        self._latest = A, gram  # held, so that no other tensor can come to lie there
        return gram


@dataclass(frozen=True)
class Outer:
    """G_bᵀ A_b, summed over the uses of a shared layer."""

    pairs: tuple[Pair, ...]
    grams: Grams

    @property
    def shape(self) -> tuple[int, int]:
        A, G, _ = self.pairs[0]
        return G.shape[1], A.shape[1]

    @property
    def number(self) -> int:
        """B."""
        return self.pairs[0].spans.number

    @property
    def dtype(self) -> torch.dtype:
        return self.pairs[0].A.dtype

    @property
    def tokens(self) -> float:
        """T, in the mean over examples."""
        return sum(pair.spans.mean for pair in self.pairs)

    @property
    def gram_pays(self) -> bool:
        """Do Gram matrices give the norms sooner than the product?"""
        return gram_pays(self.tokens, *self.shape)

    def squared(self, bound: bool = False) -> Tensor:
        if all(spans.even is not None for _, _, spans in self.pairs):
            A, G = (_along([part(p) for p in self.pairs], 1) for part in (_inputs, _outputs))
            products = torch.bmm(G, G.transpose(1, 2)).mul_(self.grams.of(A))
            found = products.sum((1, 2), dtype=wide(self.dtype))
        else:
            found = torch.stack([self._gram(b) for b in range(self.number)])
        found = found.clamp_(min=0)  # below zero only by rounding
        return found + ROUNDING * torch.finfo(self.dtype).eps * self._reach().square() if bound else found

    def _reach(self) -> Tensor:
        """[B], Σ_t ‖a_t‖ ‖g_t‖: no sum of rounding errors is larger than a multiple of eps of this."""
        found: Tensor | None = None
        for A, G, spans in self.pairs:
            lengths = (torch.linalg.vector_norm(t, dim=1, dtype=wide(self.dtype)) for t in (A, G))
            each = spans.sums(torch.mul(*lengths))
            found = each if found is None else found + each
        assert found is not None
        return found

    def _gram(self, b: int) -> Tensor:
        spans = [pair.spans.ends[b] for pair in self.pairs]
        A = _along([pair.A[i:j] for pair, (i, j) in zip(self.pairs, spans, strict=True)], 0)
        G = _along([pair.G[i:j] for pair, (i, j) in zip(self.pairs, spans, strict=True)], 0)
        return ((A @ A.t()) * (G @ G.t())).sum(dtype=wide(A.dtype))

    def total(self, weight: Tensor | None) -> Tensor:
        found: Tensor | None = None
        for A, G, spans in self.pairs:
            if weight is not None:
                c = spans.spread(weight).to(A.dtype).unsqueeze(1)
                A, G = (A * c, G) if A.shape[1] < G.shape[1] else (A, G * c)
            found = G.t() @ A if found is None else found.addmm_(G.t(), A)
        assert found is not None
        return found

    def block(self, rows: slice, out: Tensor) -> Tensor:
        for i, (A, G, spans) in enumerate(self.pairs):
            if spans.even is not None:
                pair = Pair(A, G, spans)
                g, a = _outputs(pair)[:, :, rows], _inputs(pair)
                if i:
                    out.baddbmm_(g.transpose(1, 2), a)
                else:
                    torch.bmm(g.transpose(1, 2), a, out=out)
            else:
                for one, (start, stop) in zip(out, spans.ends, strict=True):
                    torch.addmm(one, G[start:stop, rows].t(), A[start:stop], beta=int(i > 0), out=one)
        return out

    def product(self) -> Whole:
        """The gradients written out."""
        m, n = self.shape
        return Whole(self.block(slice(0, m), self.pairs[0].A.new_empty(self.number, m, n)))

    def kept(self) -> Form:
        """Factors or product."""
        return self if keep_factors(self.tokens, *self.shape) else self.product()


def _along(parts: list[Tensor], dim: int) -> Tensor:
    """`torch.cat` that does not copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _inputs(pair: Pair) -> Tensor:
    return pair.A.view(pair.spans.number, len(pair.A) // max(1, pair.spans.number), pair.A.shape[1])


def _outputs(pair: Pair) -> Tensor:
    return pair.G.view(pair.spans.number, len(pair.G) // max(1, pair.spans.number), pair.G.shape[1])


@dataclass(frozen=True)
class Rows:
    """Each token adds `D` [N, n] to the row `ids` [N] of the [m, n]; uses one after another in `ids`, `D`, `owner`.

    Attributes:
        owner: [N] int64, each token's example, `number` for nobody's.
        words: m.
        number: B.
        head: [N, n], the head's gradient of the token's example in the row `ids`, where the head is `Summed`.
    """

    ids: Tensor
    D: Tensor
    owner: Tensor
    words: int
    number: int
    head: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.words, self.D.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.D.dtype

    def squared(self, bound: bool = False) -> Tensor:
        keys, place = torch.unique(self.owner * self.words + self.ids, return_inverse=True)
        sums = self.D.new_zeros(len(keys), self.D.shape[1], dtype=wide(self.D.dtype))
        sums.index_add_(0, place, self.D.to(sums.dtype))
        found = sums.new_zeros(self.number + 1)
        return found.index_add_(0, keys // self.words, squares(sums.unsqueeze(1)))[:-1]

    def total(self, weight: Tensor | None) -> Tensor:
        D = self.D
        if weight is not None:
            D = D * torch.cat([weight, weight.new_zeros(1)])[self.owner].to(D.dtype).unsqueeze(1)
        return D.new_zeros(self.shape).index_add_(0, self.ids, D)

    def block(self, rows: slice, out: Tensor) -> Tensor:
        return self.add(rows, out.zero_())

    def add(self, rows: slice, out: Tensor) -> Tensor:
        """Add to what is in `out`."""
        here = ((self.ids >= rows.start) & (self.ids < rows.stop) & (self.owner < self.number)).nonzero().squeeze(1)
        place = self.owner[here] * (rows.stop - rows.start) + self.ids[here] - rows.start
        out.flatten(0, 1).index_add_(0, place, self.D[here].to(out.dtype))
        return out

    def kept(self) -> Form:
        """They are small."""
        return self


@dataclass(frozen=True)
class Whole:
    """Written out: V [B, m, n]."""

    V: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.V.shape[1], self.V.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.V.dtype

    def squared(self, bound: bool = False) -> Tensor:
        return squares(self.V)

    def total(self, weight: Tensor | None) -> Tensor:
        if weight is None:
            return self.V.sum(0)
        return (weight.to(self.V.dtype) @ self.V.flatten(1)).view(self.shape)

    def block(self, rows: slice, out: Tensor) -> Tensor:
        return self.V[:, rows]

    def kept(self) -> Form:
        """It is what there is."""
        return self
