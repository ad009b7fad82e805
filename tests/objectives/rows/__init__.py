"""One row buys an objective the tests of test_common.py: its data, its options and its equation in float64. A file a
family.

A reference is written from the paper's equations and shares no code with the package. From the logits of unpacked
examples it gives what each example is worth in each term:

    reference(logits [R, L, V] float64, batch, options) → {term: [B]}

Its gradient is taken by autograd, through logits that exist in full. Where the objective asks the model as the run
began, the batch has `reference_logits` [R, L, V].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fallline.contracts import Batch, Draw

WORDS, LENGTH = 23, 7

Reference = Callable[[Tensor, Batch, Any], dict[str, Tensor]]


class Texts:
    """Eight examples of 1 to 7 tokens, unevenly weighted by token; some labels are masked, 3 has none, 6 has one."""

    rows = None

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(5)
        self.size = [3, 7, 1, 5, 4, 2, 6, 7]
        self.ids = torch.randint(WORDS, (8, LENGTH), generator=g)
        self.labels = torch.randint(WORDS, (8, LENGTH), generator=g)
        self.labels[1, 2:4] = self.labels[3] = self.labels[6, 1:] = -100
        self.weight = torch.rand(8, LENGTH, generator=g, dtype=torch.float64) + 0.2
        self.weight[0, 0] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, draw: Draw, rng: torch.Generator) -> Batch:
        row = list(range(len(draw.ids))) if draw.row is None else draw.row.tolist()
        wide = LENGTH if draw.row is None else 2 * LENGTH
        pads = {"input_ids": 0, "labels": -100, "position_ids": wide, "segment": -1, "token_weight": 0.0}
        columns = {name: torch.full((max(row, default=-1) + 1, wide), pad) for name, pad in pads.items()}
        columns["token_weight"] = columns["token_weight"].double()
        used = [0] * len(columns["labels"])
        for b, (i, r) in enumerate(zip(draw.ids.tolist(), row, strict=True)):
            n = self.size[i]
            at = slice(used[r], used[r] + n)
            columns["input_ids"][r, at], columns["labels"][r, at] = self.ids[i, :n], self.labels[i, :n]
            columns["token_weight"][r, at] = self.weight[i, :n]
            columns["position_ids"][r, at], columns["segment"][r, at] = torch.arange(n), b
            used[r] += n
        if draw.row is None:
            del columns["segment"], columns["position_ids"]
        return columns


def draw(packed: bool) -> Draw:
    """All eight, unevenly weighted; packed, two or one in a row."""
    weight = torch.tensor([1, 0.5, 1, 2, 1, 1, 3, 0.25])
    return Draw(torch.arange(8), weight, torch.tensor([0, 0, 1, 1, 2, 2, 3, 4]) if packed else None)


@dataclass(frozen=True)
class Row:
    """What the common tests need to know.

    Attributes:
        id: of the method.
        reference: its equation.
        options: a setting in which all of its terms take part.
        changes: option → another value, which must change the gradient; every option of the method is there.
        source: makes its examples. draw: of all of them, packed or not. The step cuts them as it likes.
        products: of 2 N V D operations, that its head takes in forward and backward for N labels that are asked.
        more: of 2 V D operations, beyond those.
        name: of the row, where a method has several.
    """

    id: str
    reference: Reference
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    source: Callable[[], Any] = Texts
    draw: Callable[[bool], Draw] = draw
    products: int = 3
    more: Callable[[Batch], int] = lambda batch: 0
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.id
