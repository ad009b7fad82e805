"""TriAdaptLoRA: a LoRA with a matrix in the middle, whose rank grows at the layers where that matrix grows most.

    ΔW = s B C A,   s = α/√R (or α/R), R the average rank to be reached
    A = [A_0; A_1; …],  B = [B_0 B_1 …],  C = Σ_j of L_j in block row j and U_j in block column j
    after update t of T:  I = ‖C‖/(number of blocks),  score = I − I at the last time,  ρ = (t − w)/(T − w)
    the ⌊ρ (R layers − Σ r)⌋ layers of the highest score, or ⌊(R layers − Σ r)^ρ⌋, at least one, get a block of a ranks

Block j has the ranks r_j … r_j + a: A_j [a, n], B_j [m, a], L_j [a, r_j + a], U_j [r_j + a, a]; where row and column
meet, L_j and U_j add up. A_0, L_0 and U_0 begin as N(0, 0.02²) and B_0 = 0; later blocks with A_j and L_j so, and with
U_j and B_j zero: growing leaves the function as it is, and B_j and U_j have a gradient. s stays. Growth ends once Σ r
is R layers or more. A new block begins with an optimizer state of its own.

Cost: r (m + n) + Σ_j 2 a (r_j + a) trained parameters at rank r; LoRA's operations at that rank and 2 r² m at each
forward for B C. Where the rank grows is decided on the CPU, of one number a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..errors import InputError
from ..options import option
from ..per_example import linear
from . import lora
from .base import Layers, Weight
from .made_lora import MadeLora

CARD = Card(
    id="triadapt",
    kind="adapter",
    summary="A LoRA with a matrix in the middle whose rank grows, block by block, where that matrix grows most.",
    paper="TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
    year=2025,
    equation="ΔW = s B C A, C = Σ_j (L_j + U_j); where ‖C‖/blocks grew most a block is added, until Σ r = R layers",
    acts_on="matrix",
    needs=("fallline train",),
    flops="4 T n m + 6 T r (n + m) for T tokens at rank r, and 6 r² m",
    claim="above other parameter-efficient methods on understanding and generation, best with the linear threshold",
    checked=(
        "value, gradients and scores in float64 after several growths; growing changes no output beyond rounding and "
        "every new matrix then learns; layers and numbers of both thresholds against a form written apart; Σ r ends "
        "between R layers and a block for each layer that grew last; a run interrupted twice, amid growth, ends with "
        "the same bits; PEFT checkpoints with equal logits, each layer with its rank; effect not shown"
    ),
    departures=(
        "the paper's text could not be had, nor is there code of the authors: sums, thresholds and constants are those "
        "of one public implementation by others, which the abstract agrees with, the rest is our reading. That code "
        "begins with B and C zero, and later blocks all zero, which never learns; it divides by the rank there is, so "
        "that growth shrinks what was learned, where s here is fixed. The first score compares with the start. Its "
        "penalty on A and B for not being orthogonal, an option there, is left out"
    ),
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "rank allocation", "growth"),
)


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """Hyper-parameters of TriAdaptLoRA; `rank` is the average to be reached."""

    rank: int = option(8, "R, average rank to be reached", gt=0, source="public implementation")
    first: int = option(1, "rank at the start", gt=0, source="public implementation")
    block: int = option(4, "a, ranks by which a layer grows", gt=0, source="public implementation: half of R")
    growth: Literal["linear", "exponential"] = option(
        "linear",
        "how the number of layers that grow follows the share of the run that is over",
        source="the paper's best",
    )
    every: int = option(1, "updates from one growth to the next", gt=0, source="public implementation")
    warmup: int = option(0, "w, updates before the first", ge=0, source="public implementation")

    def check(self) -> None:
        super().check()
        if self.first >= self.rank:
            raise InputError(
                f"'first' is the rank at the start, 'rank' that at the end; {self.first} does not grow to {self.rank}"
            )


class Triadapt(MadeLora):
    """See the module docstring; block j has `A_j`, `B_j`, `L_j`, `U_j`; `importance` [], frozen, is I at the last time.

    Args:
        config: the options.
        size: rank here and now; None: that at the start.
    """

    id = "triadapt"
    between = True
    resizes = True
    config: Config

    @property
    def first_size(self) -> int:
        return self.config.first

    def at_size(self, size: int) -> Triadapt:
        return Triadapt(self.config, size)  # s follows from the rank to be reached, which stays

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First rank of each block and of what follows it."""
        stops = range(self.config.first, self.size + 1, self.config.block)
        return list(zip((0, *stops), stops, strict=False))

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for j, (start, stop) in enumerate(self.blocks):
            a = stop - start
            found |= {f"A_{j}": (a, n), f"B_{j}": (m, a), f"L_{j}": (a, stop), f"U_{j}": (stop, a)}
        return found

    def frozen(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        return {"importance": ()}

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        own: Any = P
        for t in (own.A_0.data, own.L_0.data, own.U_0.data):
            t.copy_(torch.empty(t.shape).normal_(0, DEVIATION, generator=noise))
        own.importance.copy_(self.importance(P))

    def carry(self, before: Any, after: Any, noise: torch.Generator) -> Mapping[str, Tensor]:
        for j in range(sum(stop <= before_rank(before) for _, stop in self.blocks), len(self.blocks)):
            for key in ("A", "L"):
                t: Tensor = getattr(after, f"{key}_{j}").data
                t.copy_(torch.empty(t.shape).normal_(0, DEVIATION, generator=noise))
        return {}

    def middle(self, P: Any) -> Tensor:
        """C [r, r]."""
        r, C = self.size, None
        for j, (start, stop) in enumerate(self.blocks):
            row = F.pad(getattr(P, f"L_{j}"), (0, r - stop, start, r - stop))
            column = F.pad(getattr(P, f"U_{j}"), (start, r - stop, 0, r - stop))
            C = row + column if C is None else C + row + column
        assert C is not None
        return C

    def importance(self, P: Any) -> Tensor:
        """I, []."""
        return torch.linalg.vector_norm(self.middle(P)) / len(self.blocks)

    def sizes(self, layers: Layers, step: int, steps: int) -> Mapping[str, int]:
        c = self.config
        now = {path: method.size for path, (method, _) in layers.items()}
        missing = c.rank * len(layers) - sum(now.values())
        if step <= c.warmup or (step - c.warmup) % c.every or missing <= 0:
            return {}
        with torch.no_grad():
            last = [P.importance.clone() for _, P in layers.values()]
            for method, P in layers.values():
                P.importance.copy_(method.importance(P))  # type: ignore[attr-defined]
            now_less_last = torch.stack([P.importance for _, P in layers.values()]) - torch.stack(last)
            scores = now_less_last.tolist()
        count = how_many(missing, (step - c.warmup) / (steps - c.warmup), c.growth, len(layers))
        least = sorted(scores, reverse=True)[count - 1]
        return {path: now[path] + c.block for path, score in zip(layers, scores, strict=True) if score >= least}

    def counts(self, layers: Layers) -> Mapping[str, Tensor]:
        return {"ranks": torch.tensor(sum(method.size for method, _ in layers.values()))}

    def pair(self, P: Any) -> tuple[Tensor, Tensor]:
        A, B = (
            torch.cat([getattr(P, f"{key}_{j}") for j in range(len(self.blocks))], d) for key, d in (("A", 0), ("B", 1))
        )
        return A, B @ self.middle(P)

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        x = F.dropout(x, self.config.dropout, training)
        h = torch.cat([linear(x, getattr(P, f"A_{j}")) for j in range(len(self.blocks))], -1)
        z = torch.zeros_like(h)
        for j, (start, stop) in enumerate(self.blocks):
            row = linear(h[..., :stop], getattr(P, f"L_{j}"))
            column = linear(h[..., start:stop], getattr(P, f"U_{j}"))
            z = z + F.pad(row, (start, self.size - stop)) + F.pad(column, (0, self.size - stop))
        each = [linear(z[..., start:stop], getattr(P, f"B_{j}")) for j, (start, stop) in enumerate(self.blocks)]
        return self.scale * torch.stack(each).sum(0)


DEVIATION = 0.02
"""Standard deviation of what begins at random; the public implementation."""


def before_rank(P: Any) -> int:
    """The rank of tensors of another size."""
    return sum(len(p) for key, p in P.named_parameters() if key.startswith("A_"))


def how_many(missing: int, share: float, growth: str, layers: int) -> int:
    """How many layers grow.

    Args:
        missing: ranks to the target. share: ρ, of the run that is over. growth: as in `Config`. layers: how many there
            are.
    """
    found = missing * share if growth == "linear" else missing**share
    count = math.floor(found + 1e-9)  # 1e-9: 100 · 0.29 is not quite 29
    return min(max(1, count), layers)


def build(config: Config) -> Triadapt:
    return Triadapt(config)
