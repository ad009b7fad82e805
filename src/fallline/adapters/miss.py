"""MiSS: one trained matrix, shared by all pieces of the input.

    s_c = Σ_j x_(j r + c)                  the input in pieces of r, added up; a last piece that is short counts as far
    y = x Wᵀ + b + s Bᵀ,   B [m, r] = 0    as it goes

It is the LoRA whose A holds ones where c = column mod r and zeros elsewhere, and is neither stored nor multiplied with.
With `mini` = k the first k rows of B are repeated down to m: k r parameters.

Cost: r m trained parameters, or r k; 4 T n m + 6 T r m + 2 T n floating-point operations for T tokens and a weight
[m, n]; of a layer's input r numbers a token are kept for the backward (with dropout its mask too).
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
from ..kernels.fold_linear import fold, fold_linear, tile
from ..options import option
from ..per_example import linear
from .base import Adapter, AdapterOptions, Weight

CARD = Card(
    id="miss",
    kind="adapter",
    summary="Adds up the input in pieces of r and trains one matrix for all of them; r m parameters, no A.",
    paper="MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing",
    year=2024,
    repository="JL-er/Bone",
    equation="y = x Wᵀ + b + s Bᵀ, s_c = Σ_j x_(j r + c), B = 0 at the start",
    acts_on="matrix",
    flops="4 T n m + 6 T r m + 2 T n for T tokens and a weight [m, n]",
    claim="Llama-2-7B tuned on MetaMathQA: GSM8K 49.36, MATH 8.8, 5.84 and 1.96 points above PiSSA (as Bone)",
    checked=(
        "equals the LoRA with the fixed A in float64, and PEFT's MissModel over 50 steps to 1e-7; keeps r numbers a "
        "token of a layer's input; checkpoints of either load in the other with equal logits; effect not shown. "
        "SmolLM2-135M-Instruct at rank 16, rates tuned alike, two seeds, held-out loss: on invented facts 0.29 ± "
        "0.11, and 0.222 ± 0.094 at rank 32, which has LoRA's number of parameters, LoRA 0.317 ± 0.079, differences "
        "0.0 [−2.5, +2.5] and −0.1 [−1.5, +1.3] (studies/adapters-facts/report.json); on family relations 0.740 ± "
        "0.014, and 0.711 ± 0.024, LoRA 0.688 ± 0.007, differences +0.05 [−0.64, +0.74] and 0.0 [−1.7, +1.8] "
        "(studies/adapters-family/report.json)"
    ),
    evidence=("studies/adapters-facts/report.json", "studies/adapters-family/report.json"),
    departures=(
        "an input that r does not divide is not padded; same result. PEFT's MiSS goes on nn.Linear alone: of GPT-2's "
        "Conv1D layers the file has PEFT's format too, but only Fallline loads it"
    ),
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "bone", "disha", "shard sharing"),
)


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Hyper-parameters of MiSS."""

    rank: int = option(64, "r, length of the pieces of the input", gt=0, source="PEFT")
    mini: int = option(0, "k, rows of B, repeated to its height, which k must divide; 0: all rows", ge=0, source="PEFT")
    dropout: float = option(0.0, "chance that an entry of the layer's input is hidden", ge=0, lt=1, source="PEFT")


class Miss(Adapter):
    """See the module docstring; `P` has `B` [m, r], or [k, r]."""

    id = "miss"
    peft_type = "MISS"
    config: Config

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        r, k = self.config.rank, self.config.mini
        if r > n:
            raise InputError(
                f"adapter 'miss' adds up pieces of 'rank' inputs, and a weight of {m} × {n} has {n}, got 'rank' = {r}"
            )
        if k and m % k:
            raise InputError(
                f"adapter 'miss' repeats 'mini' rows, which must divide the {m} of a weight of {m} × {n}, got "
                f"'mini' = {k}"
            )
        return {"B": (k or m, r)}

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        """B stays zero."""

    def delta(self, P: Any, W: Weight) -> Tensor:
        B = P.B.to(torch.promote_types(P.B.dtype, torch.float32))
        (k, r), (m, n) = B.shape, W().shape
        return B.repeat(m // k, -(-n // r))[:, :n]

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        x = F.dropout(x, self.config.dropout, training)
        return tile(linear(fold(x, self.config.rank), P.B), len(W()))

    def linear(self, P: Any, x: Tensor, W: Weight, bias: Tensor | None, training: bool) -> Tensor:
        frozen = W()
        trained = frozen.requires_grad or (bias is not None and bias.requires_grad)  # thawed beside the adapter
        if trained or (training and self.config.dropout):
            return super().linear(P, x, W, bias, training)
        return fold_linear(x, frozen, bias, P.B)

    def stored(self, P: Any) -> Mapping[str, Tensor]:
        return {"miss_block": P.B.t()}

    def peft_config(self) -> dict[str, Any]:
        c = self.config
        mini = {"init_weights": "mini", "mini_r": c.mini} if c.mini else {"init_weights": True}
        return {"r": c.rank, "miss_dropout": c.dropout, **mini}


def build(config: Config) -> Miss:
    return Miss(config)
