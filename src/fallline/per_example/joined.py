"""Gradients of a parameter that is used several times: a shared layer, or a head that is also the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from .forms import Form, Outer, Rows, Whole, wide

TWICE = "a head that is used twice in a forward, or an embedding after it, needs keep=True"


@dataclass(frozen=True)
class Tied:
    """A head's gradients, as factors, and an embedding's, of one weight."""

    head: Outer
    rows: Rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.head.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype

    def squared(self, bound: bool = False) -> Tensor:
        number = self.rows.number
        cross = self.rows.D.new_zeros(number, dtype=wide(self.dtype))
        for b in range(number):
            at = (self.rows.owner == b).nonzero().squeeze(1)
            for A, G, spans in self.head.pairs:
                start, stop = spans.ends[b]
                both = G[start:stop, self.rows.ids[at]].t() @ A[start:stop]  # the head's gradient in the rows of at
                cross[b] += (both * self.rows.D[at].to(both.dtype)).sum(dtype=cross.dtype)
        return (self.head.squared(bound) + self.rows.squared() + 2 * cross).clamp_(min=0)

    def total(self, weight: Tensor | None) -> Tensor:
        return self.head.total(weight) + self.rows.total(weight)

    def block(self, rows: slice, out: Tensor) -> Tensor:
        return self.rows.add(rows, self.head.block(rows, out))

    def kept(self) -> Form:
        head = self.head.kept()
        if isinstance(head, Whole):
            self.rows.add(slice(0, self.shape[0]), head.V)
            return head
        return self


@dataclass(frozen=True)
class Summed:
    """Only what was asked for: squared norms [B] and the sum over examples [m, n]. For a weight that is an embedding
    too, `Rows.head` has what the norms need."""

    norms: Tensor
    sum: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.sum.shape[0], self.sum.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.sum.dtype

    def squared(self, bound: bool = False) -> Tensor:
        return self.norms

    def total(self, weight: Tensor | None) -> Tensor:
        return self.sum

    def block(self, rows: slice, out: Tensor) -> Tensor:
        raise NotImplementedError

    def kept(self) -> Form:
        return self

    def plus(self, rows: Rows) -> Summed:
        """With an embedding's, which came before the head in the forward."""
        if rows.head is None:
            raise InputError(TWICE)
        cross = (rows.head * rows.D).sum(1, dtype=self.norms.dtype)
        both = self.norms.new_zeros(rows.number + 1).index_add_(0, rows.owner, cross)[:-1]
        found = self.norms + rows.squared().to(self.norms.dtype) + 2 * both
        return Summed(found.clamp_(min=0), self.sum.index_add(0, rows.ids, rows.D.to(self.sum.dtype)))


def join(forms: Sequence[Form]) -> Form:
    """The form of a sum, for a parameter that is used several times."""
    if len(forms) == 1:
        return forms[0]
    outers = [form for form in forms if isinstance(form, Outer)]
    rows = [form for form in forms if isinstance(form, Rows)]
    wholes = [form for form in forms if isinstance(form, Whole)]
    summed = [form for form in forms if isinstance(form, Summed)]
    if wholes:
        V = wholes[0].V
        for form in forms:
            if form is not wholes[0]:
                V = V + form.block(slice(0, form.shape[0]), torch.empty_like(V))
        return Whole(V)
    if summed:
        if len(summed) > 1 or outers:
            raise InputError(TWICE)
        found = summed[0]
        for row in rows:
            found = found.plus(row)
        return found
    pairs = tuple(pair for form in outers for pair in form.pairs)
    if not rows:
        return Outer(pairs, outers[0].grams)
    row = replace(
        rows[0],
        ids=torch.cat([form.ids for form in rows]),
        D=torch.cat([form.D for form in rows]),
        owner=torch.cat([form.owner for form in rows]),
    )
    return Tied(Outer(pairs, outers[0].grams), row) if outers else row
