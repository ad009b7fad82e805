"""LoRA-SB: LoRA-XS between the singular vectors of the first update that full fine-tuning would make.

    Û = −η sign(∂L/∂W) ≈ U S Vᵀ, the r leading triples;   A = Vᵀ [r, n],   B = U [m, r]
    y = x Wᵀ + b + ((x Aᵀ) Rᵀ) Bᵀ,   R [r, r] = diag(S) at the start

Û is Adam's first step. The model begins with the part of it that has rank r already made. As the rows of A and the
columns of B are orthonormal, a step of plain descent on R is the projection of full fine-tuning's step.

Cost: LoRA-XS's in training; at the start a forward and backward of `rows` rows for each part of the model whose
gradients fit into an eighth of the room of all, or into that of the adapter's optimizer state where this is more, and a
decomposition of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import low_rank
from ..catalog import Card
from ..options import option
from .base import AdapterOptions, Weight
from .lora_xs import Core

CARD = Card(
    id="lora-sb",
    kind="adapter",
    summary="Trains an r × r matrix between the singular vectors of full fine-tuning's first update.",
    paper="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
    year=2024,
    repository="RaghavSinghal10/lora-sb",
    equation="y = x Wᵀ + b + ((x Aᵀ) Rᵀ) Bᵀ, U S Vᵀ ≈ −η sign(∂L/∂W): A = Vᵀ, B = U, R = diag(S) at the start",
    acts_on="matrix",
    needs=("data before step 0",),
    flops="4 T n m + 4 T r (n + m) + 6 T r² for T tokens; at the start passes over `rows` rows",
    claim="above LoRA-XS, and above LoRA with 27 to 90 times fewer trained parameters",
    checked=(
        "the first change is the best approximation of rank r of −η sign(G) in float64; a plain step on R is the "
        "projection of full tuning's; r² trained parameters; PEFT checkpoints with equal logits; effect not shown. "
        "SmolLM2-135M-Instruct at rank 16, rates tuned alike, two seeds, held-out loss: on invented facts 0.856 ± "
        "0.046, and 0.4145 ± 0.0025 at rank 152, which has LoRA's number of parameters, LoRA 0.317 ± 0.079, "
        "differences +0.5 [−2.4, +3.5] and +0.1 [−7.2, +7.4] (studies/adapters-facts/report.json); on family "
        "relations 0.744 ± 0.066, and 0.7260 ± 0.0044, LoRA 0.688 ± 0.007, differences +0.1 [−7.2, +7.3] and +0.04 "
        "[−0.22, +0.30] (studies/adapters-family/report.json)"
    ),
    evidence=("studies/adapters-facts/report.json", "studies/adapters-family/report.json"),
    departures=(
        "η is an option; released code computes it from learning rate, warm-up and steps. Singular vectors stay in "
        "float32 and are found with four times as many directions as are kept; released code rounds them to bfloat16 "
        "and keeps all it finds"
    ),
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "initialisation", "gradient", "tiny"),
)


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Hyper-parameters of LoRA-SB."""

    rank: int = option(64, "r, side of the trained matrix", gt=0, source="as lora-xs; 96 in the paper at 7B")
    first_rate: float = option(
        1e-5, "η, size of the first update", gt=0, source="chosen here: the first of 100 warm-up steps to 1e-3"
    )
    rows: int = option(50, "rows of data to take the gradient on", ge=1, source="released scripts")

    scale = 1.0
    """s; with orthonormal A and B the method has no other."""


class LoraSb(Core):
    """See the module docstring."""

    id = "lora-sb"
    needs = "gradient"
    config: Config

    def begin(self, P: nn.Module, W: Weight, noise: torch.Generator, found: Tensor) -> None:
        own: Any = P
        U, S, V = low_rank(-self.config.first_rate * found.sign(), self.config.rank, noise)
        own.A.copy_(V.t())
        own.B.copy_(U)
        own.core.copy_(S.diag())


def build(config: Config) -> LoraSb:
    return LoraSb(config)
