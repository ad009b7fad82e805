"""LoRA-XS: between the leading singular vectors of the weight, only a small square matrix is trained.

    W ≈ U S Vᵀ, the r leading singular triples;   A = S Vᵀ [r, n],   B = U [m, r]
    y = x Wᵀ + b + s ((x Aᵀ) Rᵀ) Bᵀ,   R [r, r] ~ N(0, 10⁻¹⁰)

The trained parameters do not grow with the width of the model, so the rank can be large.

Cost: r² trained parameters and r (m + n) frozen ones for a weight [m, n]; 4 T n m + 4 T r (n + m) + 6 T r²
floating-point operations for T tokens; of a layer's input no more than r numbers a token are kept for the backward. At
the start a decomposition of each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate import low_rank
from ..catalog import Card
from ..errors import InputError
from ..options import option
from ..per_example import linear
from .base import Adapter, AdapterOptions, LoraFactors, Weight

CARD = Card(
    id="lora-xs",
    kind="adapter",
    summary="Trains an r × r matrix between the weight's leading singular vectors; r² parameters a layer.",
    paper="LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
    year=2024,
    repository="MohammadrezaBanaei/LoRA-XS",
    equation="y = x Wᵀ + b + s ((x Aᵀ) Rᵀ) Bᵀ, A = S Vᵀ, B = U of the r leading singular triples of W",
    acts_on="matrix",
    flops="4 T n m + 4 T r (n + m) + 6 T r² for T tokens",
    checked=(
        "value and gradient of R in float64; A and B against the decomposition; r² trained parameters; with another "
        "core the same change as PEFT's PSOFT without its rotation; PEFT checkpoints with equal logits; effect not "
        "shown"
    ),
    departures="s is an option of its own and 1; α/r in the paper's code, whose α differs from script to script",
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "singular vectors", "tiny"),
)


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Hyper-parameters of LoRA-XS."""

    rank: int = option(64, "r, side of the trained matrix", gt=0, source="chosen here: some 3 % of LoRA's at rank 16")
    scale: float = option(1.0, "s, strength of the change", gt=0, source="LoRA-SB's code, for both")


class Core(Adapter):
    """ΔW = s B R A with A and B frozen; `P` has `core` [r, r] and, frozen, `A` [r, n] and `B` [m, r]."""

    config: Any

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        r = self.config.rank
        if r > min(m, n):
            raise InputError(
                f"adapter {self.id!r} takes 'rank' directions of a weight, and one of {m} × {n} has {min(m, n)}, "
                f"got 'rank' = {r}"
            )
        return {"core": (r, r)}

    def frozen(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        return {"A": (self.config.rank, n), "B": (m, self.config.rank)}

    def delta(self, P: Any, W: Weight) -> Tensor:
        wide = torch.promote_types(P.core.dtype, torch.float32)
        return self.config.scale * P.B.to(wide) @ P.core.to(wide) @ P.A.to(wide)

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        inside = linear(F.linear(x, P.A.to(x.dtype)), P.core)
        return self.config.scale * F.linear(inside, P.B.to(x.dtype))

    def factors(self, P: Any) -> LoraFactors:
        return LoraFactors(P.A, self.config.scale * P.B @ P.core, self.config.rank)


class LoraXs(Core):
    """See the module docstring."""

    id = "lora-xs"
    config: Config

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        own: Any = P
        U, S, V = low_rank(W().detach(), self.config.rank, noise)
        own.A.copy_((V * S).t())
        own.B.copy_(U)
        own.core.copy_(torch.empty(own.core.shape).normal_(0, DEVIATION, generator=noise))


DEVIATION = 1e-5
"""Standard deviation of R at the start; the paper."""


def build(config: Config) -> LoraXs:
    return LoraXs(config)
