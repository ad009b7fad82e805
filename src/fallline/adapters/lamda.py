"""LaMDA: a small square matrix between the leading singular vectors of the weight, of which the left are trained early.

    W ≈ U S Vᵀ, the r leading singular triples;   A = Vᵀ [r, n] frozen,   B = U [m, r] at the start,   C [r, r] = 0
    y = x Wᵀ + b + s ((x Aᵀ) Cᵀ) Bᵀ
    in update k, from 0, of T the first ⌊r k/(η T)⌋ columns of B are frozen, those of the largest singular values first

C = 0, so the model begins as it was. From update η T on only C is trained. A column that freezes leaves the optimizer:
neither momentum nor weight decay moves it further, and its gradient and moments are freed.

Cost: r² + r m trained parameters for a weight [m, n] at the start, r² in the end, and r (m + n) numbers beside it that
are frozen, or will be; 4 T n m + 4 T r (n + m) + 6 T r² floating-point operations for T tokens, and 2 T r m more for
all of B. Of a layer's input no more than r numbers a token are kept for the backward. At the start a decomposition of
each weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate import low_rank
from ..catalog import Card
from ..options import option
from ..per_example import linear
from .base import AdapterOptions, Layers, LoraFactors, Weight
from .lora_xs import Core
from .rerank import take

CARD = Card(
    id="lamda",
    kind="adapter",
    summary="Trains an r × r matrix between the weight's leading singular vectors; the left ones too, but only early.",
    paper="LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
    year=2024,
    repository="ArminAzizi98/LaMDA",
    equation="y = x Wᵀ + b + s ((x Aᵀ) Cᵀ) Bᵀ, A = Vᵀ, B = U of W ≈ U S Vᵀ; at update k ⌊r k/(η T)⌋ of B fixed",
    acts_on="matrix",
    needs=("fallline train",),
    flops="4 T n m + 4 T r (n + m) + 6 T r² for T tokens, and 2 T r m more while all of B is trained",
    claim="up to 17.7 times fewer parameter updates and 1.32 times less peak GPU memory at the same quality",
    checked=(
        "value and gradients in float64, also with part of B frozen; A and B against the decomposition; in a run the "
        "columns that are frozen are the same bits ever after, with AdamW and decay, and what is trained falls to r²; "
        "fewer bytes kept for the backward than LoRA; a run interrupted twice, amid freezing, ends with the same bits; "
        "PEFT checkpoints with equal logits; effect not shown"
    ),
    departures=(
        "the abstract and summaries say: leading singular vectors, B frozen step by step by singular value. That C "
        "begins at 0, η and the order are our reading; s is an option of its own and 1. Released code has random A and "
        "C and zero B, and lacks the factor r in the schedule, so that it freezes three columns at most; it clears "
        "gradients, and momentum and decay still move what should be frozen. Its dropout, which costs the saving in "
        "activations, is left out. LaMDA++ is not here: its rule for ranks could not be confirmed"
    ),
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "singular vectors", "freezing"),
)


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Hyper-parameters of LaMDA."""

    rank: int = option(32, "r, side of the matrix that is trained to the end", gt=0, source="chosen here: twice lora's")
    scale: float = option(1.0, "s, strength of the change", gt=0, source="chosen here: as lora-xs")
    eta: float = option(
        0.3, "η, share of the run after which all of B is frozen", gt=0, le=1, source="chosen here; no source was found"
    )


class Lamda(Core):
    """See the module docstring; `P` has `core` [r, r], `B` [m, size], and, frozen, `A` [r, n] and `held` [m, r − size],
    the columns of B that are not trained any more.

    Args:
        config: the options.
        size: columns of B that are trained; None: all.
    """

    id = "lamda"
    between = True
    resizes = True
    config: Config

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        return {**super().shapes(m, n), **({"B": (m, self.size)} if self.size else {})}

    def frozen(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        r = self.config.rank
        return {"A": (r, n), **({"held": (m, r - self.size)} if self.size < r else {})}

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        own: Any = P
        U, _, V = low_rank(W().detach(), self.config.rank, noise)
        own.A.copy_(V.t())
        own.B.copy_(U)

    def sizes(self, layers: Layers, step: int, steps: int) -> Mapping[str, int]:
        left = self.config.rank - frozen_columns(self.config.rank, step, steps, self.config.eta)
        return dict.fromkeys(layers, left) if left < self.size else {}

    def carry(self, before: Any, after: Any, noise: torch.Generator) -> Mapping[str, Tensor]:
        held = before.B.shape[1] - self.size  # how many freeze now
        after.held.copy_(torch.cat([*kept(before, "held"), before.B[:, :held]], 1))
        if not self.size:
            return {}
        return {"B": take(before.B, after.B, 1, torch.arange(held, before.B.shape[1], device=before.B.device))}

    def counts(self, layers: Layers) -> Mapping[str, Tensor]:
        trained = sum(p.numel() for _, P in layers.values() for p in P.parameters())
        return {"trained": torch.tensor(trained)}

    def second(self, P: Any) -> Tensor:
        """All of B [m, r]."""
        return torch.cat([*kept(P, "held"), *kept(P, "B")], 1)

    def delta(self, P: Any, W: Weight) -> Tensor:
        wide = torch.promote_types(P.core.dtype, torch.float32)
        return self.config.scale * self.second(P).to(wide) @ P.core.to(wide) @ P.A.to(wide)

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        held = self.config.rank - self.size
        inside = self.config.scale * linear(F.linear(x, P.A.to(x.dtype)), P.core)
        parts = [F.linear(inside[..., :held], each.to(x.dtype)) for each in kept(P, "held")]
        parts += [linear(inside[..., held:], each) for each in kept(P, "B")]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def factors(self, P: Any) -> LoraFactors:
        return LoraFactors(P.A, self.config.scale * self.second(P) @ P.core, self.config.rank)


def kept(P: Any, name: str) -> list[Tensor]:
    """A tensor of `P`, or nothing."""
    return [getattr(P, name)] if hasattr(P, name) else []


def frozen_columns(rank: int, step: int, steps: int, eta: float) -> int:
    """⌊r k/(η T)⌋, r at most: how many columns of B update k, from 0, of T leaves alone."""
    return min(rank, math.floor(rank * step / (eta * steps) + 1e-9))  # 1e-9: 0.3 · 10 is not quite 3


def build(config: Config) -> Lamda:
    return Lamda(config)
