"""BAT: each block of the weight is passed through a small matrix of its row of blocks.

    ΔW_ij = W_ij D_i + D_i,   blocks [r, r]: i counts them down, j across;   D [m/r, r, r] = 0
    y = x (W + ΔW)ᵀ + b

So W'_ij + I = (W_ij + I)(I + D_i). The change depends on the weight and can have full rank, where MiSS, with as many
parameters, has rank r and adds the same to all blocks of a row.

Cost: r m trained parameters for a weight [m, n]; 6 T n m + 6 m n r floating-point operations for T tokens, which is
full fine-tuning's and the making of the changed weight, twice; while a layer computes, one weight more; each layer's
input is kept for the backward, and layers with the same input keep one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..errors import InputError
from ..kernels.block_linear import block_linear, changed
from ..options import option
from .base import Adapter, AdapterOptions, Weight

CARD = Card(
    id="bat",
    kind="adapter",
    summary="Passes each r × r block of the weight through a trained matrix; full rank from r m parameters.",
    paper="Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
    year=2024,
    repository="JL-er/Bone",
    equation="ΔW_ij = W_ij D_i + D_i in blocks r × r, D = 0 at the start; y = x (W + ΔW)ᵀ + b",
    acts_on="matrix",
    flops="6 T n m + 6 m n r for T tokens and a weight [m, n]",
    checked=(
        "against the loop over blocks in float64, derivatives to second order, and PEFT's MissModel with "
        "init_weights='bat' over 50 steps to 1e-7; neither changed weight nor its gradient is kept; checkpoints of "
        "either load in the other with equal logits; effect not shown"
    ),
    departures=(
        "unmerging brings back a copy of the weights; PEFT inverts I + D, up to rounding. On a bfloat16 model the "
        "changed weight is made in float32 and the product runs in bfloat16, PEFT's in float32. PEFT's goes on "
        "nn.Linear alone: of GPT-2's Conv1D layers the file has PEFT's format too, but only Fallline loads it"
    ),
    tags=("peft", "full rank", "fine-tuning", "parameter-efficient", "bone", "miss", "block affine"),
)


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Hyper-parameters of BAT."""

    rank: int = option(64, "r, side of the blocks; it must divide both sides of the weights", gt=0, source="PEFT")


class Bat(Adapter):
    """See the module docstring; `P` has `D` [m/r, r, r]."""

    id = "bat"
    peft_type = "MISS"
    config: Config

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        r = self.config.rank
        if m % r or n % r:
            raise InputError(
                f"adapter 'bat' cuts weights into blocks of 'rank' × 'rank', and one of {m} × {n} cannot be cut so, "
                f"got 'rank' = {r}"
            )
        return {"D": (m // r, r, r)}

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        """D stays zero."""

    def delta(self, P: Any, W: Weight) -> Tensor:
        return changed(W(), P.D.to(torch.promote_types(P.D.dtype, torch.float32)), False)

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        frozen = W()  # ΔW is formed after all: to go without takes m/r times the activations
        if frozen.requires_grad:  # thawed beside the adapter
            return F.linear(x, self.delta(P, W).to(x.dtype))
        return block_linear(x, frozen, None, P.D, whole=False, again=getattr(W, "again", None))

    def linear(self, P: Any, x: Tensor, W: Weight, bias: Tensor | None, training: bool) -> Tensor:
        frozen = W()
        if frozen.requires_grad or (bias is not None and bias.requires_grad):
            return super().linear(P, x, W, bias, training)
        return block_linear(x, frozen, bias, P.D)

    def stored(self, P: Any) -> Mapping[str, Tensor]:
        return {"miss_block": P.D}

    def peft_config(self) -> dict[str, Any]:
        return {"r": self.config.rank, "miss_dropout": 0.0, "init_weights": "bat"}


def build(config: Config) -> Bat:
    return Bat(config)
