"""One row for each adapter: what the common tests need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fallline.adapters import attach
from fallline.adapters.layers import inject
from fallline.catalog import find

from .models import tokens


@dataclass(frozen=True)
class Row:
    """An adapter as the common tests take it.

    Attributes:
        id: of the method.
        options: with which it is tried; they fit weights of 32 × 32, 32 × 48 and their turns.
        others: option → another value, for every option but `targets`: each must change what is trained.
        trained: (m, n) → how many parameters are trained for a weight [m, n].
        by_rank: `trained` is for each rank that a layer has, as its data may have changed that.
        as_before: the model is unchanged at the start.
        rate: AdamW's, at which a few steps change much.
        per_example: the engine of per-example gradients knows it; otherwise it names a parameter.
        peft: PEFT's type, when it is not a LoRA.
        peft_conv1d: PEFT has it for GPT-2's layers too.
    """

    id: str
    options: Mapping[str, Any]
    others: Mapping[str, Any]
    trained: Callable[[int, int], int]
    as_before: bool = True
    rate: float = 2e-2
    per_example: bool = True
    peft: str = "LORA"
    by_rank: bool = False
    peft_conv1d: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.id

    @property
    def needs(self) -> str:
        return str(self.build().needs)

    @property
    def resizes(self) -> bool:
        """It changes its shape between steps."""
        return bool(self.build().resizes)

    def config(self, **options: Any) -> Any:
        return find("adapter", self.id).load().Config.from_mapping(dict(self.options) | options, self.id)

    def build(self, **options: Any) -> Any:
        return find("adapter", self.id).load().build(self.config(**options))

    def on(self, model: Any, **options: Any) -> Any:
        """The model with this adapter, begun from a little data if that is what it needs."""
        if self.resizes:
            inject(model, self.build(**options), seed=0)  # what `attach` refuses, and a run does
            return model
        data = {"data": batches()} if self.needs else {}
        return attach(model, self.id, **(dict(self.options) | options), **data)


def batches() -> list[dict[str, torch.Tensor]]:
    ids = tokens(rows=4)
    return [{"input_ids": row, "labels": row} for row in ids.split(1)]


ROWS = (
    Row(
        "lora",
        {"rank": 4},
        {"rank": 3, "alpha": 4.0, "rslora": False, "dropout": 0.3},
        lambda m, n: 4 * (m + n),
    ),
    Row(
        "lora-ga",
        {"rank": 4, "rows": 4},
        {"rank": 3, "alpha": 4.0, "rslora": False, "dropout": 0.3, "gamma": 4.0},
        lambda m, n: 4 * (m + n),
    ),
    Row(
        "lora-xs",
        {"rank": 8},
        {"rank": 7, "scale": 0.5},
        lambda m, n: 8 * 8,
        rate=0.1,
        more={"nearly": 1e-3},
    ),
    Row(
        "lora-sb",
        {"rank": 8, "rows": 4},
        {"rank": 7, "first_rate": 1e-3},
        lambda m, n: 8 * 8,
        as_before=False,
        rate=0.2,
    ),
    Row(
        "sora",
        {"rank": 4, "threshold": 0.1, "prune_every": 1},
        {"rank": 3, "alpha": 4.0, "rslora": False, "dropout": 0.3, "threshold": 0.2, "prune_every": 0},
        lambda m, n: 4 * (m + n) + 4,
    ),
    Row(
        "lamda",
        {"rank": 8, "eta": 0.7},
        {"rank": 7, "scale": 0.5, "eta": 0.3},
        lambda m, n: 8 * 8 + 8 * m,
        rate=0.04,
    ),
    Row(
        "triadapt",
        {"rank": 4, "block": 2},
        {"rank": 3, "alpha": 4.0, "rslora": False, "dropout": 0.3}
        | {"first": 2, "block": 1, "growth": "exponential", "every": 2, "warmup": 1},
        lambda m, n: m + n + 2,
        rate=0.05,
    ),
    Row(
        "ggpo",
        {"rank": 4},
        {"rank": 3, "alpha": 4.0, "rslora": False, "dropout": 0.3, "rho": 0.05, "momentum": 0.5, "smoothing": 0.5},
        lambda m, n: 4 * (m + n),
    ),
    Row(
        "allora",
        {"rank": 4},
        {"rank": 3, "eta": 1.0},
        lambda m, n: 4 * (m + n),
    ),
    Row(
        "loldu",
        {"rank": 8},
        {"rank": 7, "scale": 0.5},
        lambda m, n: 9,
        rate=0.1,
    ),
    Row(
        "nola",
        {"rank": 4, "bases": 32},
        {"rank": 3, "alpha": 4.0, "rslora": False, "dropout": 0.3, "bases": 31},
        lambda m, n: 64,
        rate=0.1,
        per_example=False,
    ),
    Row(
        "eva",
        {"rank": 3, "rows": 4},
        {"rank": 2, "alpha": 4.0, "rslora": False, "dropout": 0.3, "rho": 1.0, "tau": 1e-3},
        lambda m, n: m + n,
        by_rank=True,
    ),
    Row(
        "miss",
        {"rank": 8},
        {"rank": 7, "mini": 8, "dropout": 0.3},
        lambda m, n: 8 * m,
        peft="MISS",
        peft_conv1d=False,
    ),
    Row(
        "bat",
        {"rank": 8},
        {"rank": 4},
        lambda m, n: 8 * m,
        peft="MISS",
        peft_conv1d=False,
    ),
    Row(
        "randlora",
        {"rank": 6, "alpha": 12.0},
        {"rank": 5, "alpha": 6.0, "dropout": 0.3},
        lambda m, n: -(-min(m, n) // 6) * (6 + min(m, n)),
        peft="RANDLORA",
    ),
)
