"""LoRA: a low-rank change beside a frozen weight.

    ΔW = s B A,   A [r, n] ~ U(−1/√n, 1/√n),   B [m, r] = 0,   s = α/√r (rsLoRA), or α/r

    y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ

At step 0 ΔW is zero, so is ∂L/∂A = s Bᵀ G, and ∂L/∂B = s G Aᵀ is not (G = ∂L/∂W). With α/√r the change does not
shrink as the rank grows.

Cost: r (m + n) trained parameters for a weight [m, n], 16 bytes each with AdamW in float32; 4 T n m + 6 T r (n + m)
floating-point operations for T tokens instead of 6 T n m; each layer's input is kept for the backward, and without
dropout layers with the same input keep one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..kernels.lora_linear import lora_linear
from ..options import option
from ..per_example import linear
from .base import Adapter, AdapterOptions, LoraFactors, Weight

CARD = Card(
    id="lora",
    kind="adapter",
    summary="A low-rank change ΔW = s B A beside each frozen weight; saved as a PEFT checkpoint.",
    paper="LoRA: Low-Rank Adaptation of Large Language Models; A Rank Stabilization Scaling Factor for Fine-Tuning",
    year=2021,
    repository="microsoft/LoRA",
    equation="y = x Wᵀ + b + s (x Aᵀ) Bᵀ, s = α/√r (rsLoRA) or α/r",
    acts_on="matrix",
    flops="4 T n m + 6 T r (n + m) for T tokens and a weight [m, n], against 6 T n m of full fine-tuning",
    checked=(
        "equation and gradients in float64; 50 steps agree with PEFT's to 1e-7 in float64; checkpoints of either load "
        "in the other with equal logits after training. SmolLM2-135M-Instruct on 25 invented facts: 50 of 50 "
        "rephrased questions right, 0 before; loss on unrelated text up by 0.23 nats (python "
        "benchmarks/invented_facts.py). A step takes 0.88 of PEFT's time (python benchmarks/lora_step.py --pairs 21). "
        "Beside full fine-tuning, rates tuned alike, two seeds, held-out loss, with α/r: on invented facts 0.317 ± "
        "0.079, full 0.213 ± 0.092, full's minus LoRA's −0.1 [−1.3, +1.1] (studies/adapters-facts/report.json); on "
        "family relations 0.688 ± 0.007, full 0.706 ± 0.027, 0.0 [−2.0, +2.0] (studies/adapters-family/report.json)"
    ),
    evidence=(
        "benchmarks/results/invented_facts.json",
        "benchmarks/results/lora_step.json",
        "studies/adapters-facts/report.json",
        "studies/adapters-family/report.json",
    ),
    departures="scales by α/√r unless told otherwise; the paper and PEFT by α/r",
    tags=("peft", "low rank", "rslora", "fine-tuning", "parameter-efficient"),
)


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Hyper-parameters of LoRA."""

    rank: int = option(16, "r, the rank of the change", gt=0, source="chosen here, twice PEFT's")
    alpha: float = option(8.0, "α, strength of the change", gt=0, source="chosen here: with rank 16 the usual s = 2")
    rslora: bool = option(True, "scale by α/√r; false: by α/r", source="rank-stabilised LoRA (2023)")
    dropout: float = option(
        0.0, "chance that an entry of the layer's input is hidden from A", ge=0, lt=1, source="PEFT"
    )


class Lora(Adapter):
    """See the module docstring; `P` has `lora_A` [r, n] and `lora_B` [m, r]."""

    id = "lora"
    config: Config

    @property
    def scale(self) -> float:
        """s."""
        return self.config.alpha / (math.sqrt(self.config.rank) if self.config.rslora else self.config.rank)

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        return {"lora_A": (self.config.rank, n), "lora_B": (m, self.config.rank)}

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        A: Any = P.lora_A
        bound = 1 / math.sqrt(A.shape[1])
        A.data.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=noise))

    def delta(self, P: Any, W: Weight) -> Tensor:
        wide = torch.promote_types(P.lora_A.dtype, torch.float32)
        return self.scale * P.lora_B.to(wide) @ P.lora_A.to(wide)

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        x = F.dropout(x, self.config.dropout, training)
        return self.scale * linear(linear(x, P.lora_A), P.lora_B)

    def linear(self, P: Any, x: Tensor, W: Weight, bias: Tensor | None, training: bool) -> Tensor:
        frozen = W()
        trained = frozen.requires_grad or (bias is not None and bias.requires_grad)  # thawed beside the adapter
        if trained or (training and self.config.dropout):
            return super().linear(P, x, W, bias, training)
        return lora_linear(x, frozen, bias, P.lora_A, P.lora_B, self.scale)

    def factors(self, P: Any) -> LoraFactors:
        return LoraFactors(P.lora_A, P.lora_B, self.config.alpha)

    def peft_config(self) -> dict[str, Any]:
        c = self.config
        return {"r": c.rank, "lora_alpha": c.alpha, "lora_dropout": c.dropout, "use_rslora": c.rslora}


def build(config: Config) -> Lora:
    return Lora(config)
