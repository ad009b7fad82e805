"""ALLoRA: a LoRA without scale and dropout, whose gradients are larger for the rows of the weight that moved least.

    y = x Wᵀ + b + (x Aᵀ) Bᵀ,   A and B at the start as LoRA's
    c_i = 1/√(‖(B A)_i‖ + 1/η²) for each row i, anew at every forward
    ∂L/∂A := Bᵀ diag(c) G,   ∂L/∂B := diag(c) G Aᵀ,   G = ∂L/∂(B A)

c is η where B is zero and falls as a row grows, so that B leaves zero fast. The gradient that goes on to the layer's
input is not scaled. ‖(B A)_i‖² = B_i (A Aᵀ) B_iᵀ, in float32 at least; B A is never formed.

Cost: LoRA's without dropout; 2 r² (m + n) operations for c at each forward and 2 T m r in the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..catalog import Card
from ..kernels.row_scaled_lora import row_scaled_lora
from ..options import option
from .base import Adapter, AdapterOptions, LoraFactors, Weight
from .lora import Lora

CARD = Card(
    id="allora",
    kind="adapter",
    summary="A LoRA without scale and dropout; gradients are larger for rows of the weight that moved little.",
    paper="ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws",
    year=2024,
    equation="y = x Wᵀ + b + (x Aᵀ) Bᵀ; row i of ∂L/∂(B A) times 1/√(‖(B A)_i‖ + 1/η²) for A and B",
    acts_on="matrix",
    flops="4 T n m + 6 T r (n + m) + 2 T r m + 2 r² (m + n) for T tokens",
    claim="0.3 points above LoRA and DoRA on average: three small models on four classification sets; Llama-3-8B on "
    "eight commonsense tasks",
    checked=(
        "value, gradients and factors against a dense form in float64, per-example norms too; η at B = 0 and falling "
        "with a row's norm; with SGD B leaves zero faster than LoRA's; PEFT checkpoints with equal logits; effect not "
        "shown"
    ),
    departures=(
        "no official code was found. What is trained by is no gradient of the loss: the gradient norm, clipping and "
        "per-example norms are of what is scaled, and there is no second derivative. Adam divides by the size of the "
        "gradient and so takes most of the scaling back"
    ),
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "learning rate"),
)


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Hyper-parameters of ALLoRA."""

    rank: int = option(16, "r, the rank of the change", gt=0, source="as lora; the paper's at 8B")
    eta: float = option(
        2.0, "η, the factor of a row that has not moved", gt=0, source="largest of the paper's, η² ∈ {1, 2, 4}"
    )


class Allora(Lora):
    """See the module docstring; `P` has `lora_A` [r, n] and `lora_B` [m, r]."""

    id = "allora"
    config: Any
    scale = 1.0

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        return row_scaled_lora(x, None, None, P.lora_A, P.lora_B, self.factor(P))

    def linear(self, P: Any, x: Tensor, W: Weight, bias: Tensor | None, training: bool) -> Tensor:
        frozen = W()
        if frozen.requires_grad or (bias is not None and bias.requires_grad):  # thawed beside the adapter
            return Adapter.linear(self, P, x, W, bias, training)
        return row_scaled_lora(x, frozen, bias, P.lora_A, P.lora_B, self.factor(P))

    def factor(self, P: Any) -> Tensor | None:
        """c [m], where there can be a gradient to scale."""
        return row_factor(P.lora_A.detach(), P.lora_B.detach(), self.config.eta) if torch.is_grad_enabled() else None

    def factors(self, P: Any) -> LoraFactors:
        return LoraFactors(P.lora_A, P.lora_B, self.config.rank)

    def peft_config(self) -> dict[str, Any]:
        return Adapter.peft_config(self)


def row_factor(A: Tensor, B: Tensor, eta: float) -> Tensor:
    """c [m] for A [r, n] and B [m, r]."""
    with torch.autocast(A.device.type, enabled=False):
        wide = torch.promote_types(A.dtype, torch.float32)
        A, B = A.to(wide), B.to(wide)
        squared = ((B @ (A @ A.t())) * B).sum(1).clamp_(min=0)  # rounding may make less than 0 of it
        return (squared.sqrt() + 1 / eta**2).rsqrt()


def build(config: Config) -> Allora:
    return Allora(config)
