"""EVA: a LoRA whose A begins as the directions in which its layer's inputs vary, with ranks where these explain most.

    X [T, n] inputs of a layer on some data;   X − x̄ = U S Vᵀ,   A [r_i, n] = V[:, :r_i]ᵀ,   B [m, r_i] = 0
    r_i = how many of layer i's k leading S²/‖X − x̄‖² are among the Σ r best of all layers,   k = ρ r

B = 0, so the model begins as it was. A layer may get no rank at all, and is then left alone. Whatever the rank, s stays
what it would be at rank r. Layers with the same input, such as q, k and v, begin with the same A.

Cost: LoRA's in training, with Σ r_i (m + n) trained parameters; at the start forwards of `rows` rows or fewer, and a
decomposition of [k + t + 1, n] for each distinct input and batch of t tokens. Until training begins k n numbers are
held for each distinct input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import Card
from ..errors import InputError
from ..options import option
from . import lora
from .base import Weight
from .ranked import RankedLora

CARD = Card(
    id="eva",
    kind="adapter",
    summary="A LoRA that begins from the principal directions of layer inputs, with ranks where these explain most.",
    paper="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
    year=2024,
    repository="ml-jku/EVA",
    equation="A₀ = V[:, :r_i]ᵀ of inputs X − x̄ = U S Vᵀ, B₀ = 0; r_i by the largest S²/‖X − x̄‖² of all layers",
    acts_on="matrix",
    needs=("data before step 0",),
    flops="4 T n m + 6 T r_i (n + m) for T tokens and a weight [m, n]; at the start forwards of `rows` rows or fewer",
    claim="best average of the compared methods over language generation and understanding, images and control",
    checked=(
        "principal components of one batch in float64, and of all when nothing is dropped; scikit-learn's incremental "
        "ones; directions and ranks are PEFT's on the same tokens; the sum of ranks; the model is unchanged at the "
        "start. On synthetic inputs of rank 4, 50 steps of plain descent end below LoRA's, at the smaller of five "
        "rates and at the best for each; at the largest it may end above; on language effect not shown. "
        "SmolLM2-135M-Instruct at rank 16, rates tuned alike, two seeds, held-out loss: 0.277 ± 0.059 on invented "
        "facts, LoRA 0.317 ± 0.079, difference 0.0 [−1.9, +1.8] (studies/adapters-facts/report.json); 0.772 ± 0.024 "
        "on family relations, LoRA 0.688 ± 0.007, +0.1 [−2.9, +3.1] (studies/adapters-family/report.json)"
    ),
    evidence=("studies/adapters-facts/report.json", "studies/adapters-family/report.json"),
    departures=(
        "PEFT has the authors' code. It looks at the positions of labels, here at those before them, whose outputs "
        "predict the labels; it repeats the data until all directions are steady, here each row is seen once; it skips "
        "batches of fewer than k tokens; under rsLoRA its s follows the rank, here s stays. Without whitening"
    ),
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "initialisation", "activations", "rank allocation"),
)


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """Hyper-parameters of EVA; `rank` is the average over the layers."""

    rho: float = option(2.0, "ρ, how many times 'rank' a layer may have; 1: all have 'rank'", ge=1, source="PEFT")
    tau: float = option(
        0.99, "τ, cosine between a direction before and after a batch at which it is done", gt=0, le=1, source="PEFT"
    )
    rows: int = option(64, "rows of data to look at, at most", ge=1, source="chosen here: as lora-ga")


class Eva(RankedLora):
    """See the module docstring; `P` has `lora_A` [r_i, n] and `lora_B` [m, r_i]."""

    id = "eva"
    needs = "inputs"
    config: Config

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        if self.config.rank > n:
            raise InputError(
                f"adapter 'eva' takes 'rank' directions of a layer's input, and that of a weight {m} × {n} has {n}"
            )
        return super().shapes(m, n)

    def begin(self, P: nn.Module, W: Weight, noise: torch.Generator, found: Tensor) -> None:
        own: Any = P
        own.lora_A.copy_(found)


def build(config: Config) -> Eva:
    return Eva(config)
