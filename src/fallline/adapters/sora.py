"""SoRA: a LoRA with a gate on each rank, which an L1 step drives to zero; what it shuts is left out when saved.

    y = x Wᵀ + b + s ((x Aᵀ) ⊙ g) Bᵀ,   A [r, n] and B [m, r] as LoRA's,   g [r] ~ N(0, 1),   s as LoRA's
    after each update   g ← sign(g) max(|g| − ξ, 0)

The second line is the proximal step of ξ Σ|g|. A rank with g = 0 gives its A and B no gradient and no change of the
weight; its gate opens again only where the optimizer's next step on g is larger than ξ. A gate of 1 that nothing holds
open is shut after 1/ξ updates.

With `prune_every` shut ranks are dropped in the run too, and cannot open again: A, B, g and the optimizer's state of
them are freed, and nothing that is computed changes. A layer without an open rank keeps one.

Cost: LoRA's, r more parameters and m r more products. Saved are the ranks that are left, in each layer its own number:
`adapter_config.json` of every checkpoint has them (`r`, `rank_pattern`); a layer without any has one that is zero. The
run's metrics have their sum, `adapter_ranks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..options import option
from ..per_example import linear, vectors
from . import lora
from .base import Layers, LoraFactors, Weight
from .made_lora import MadeLora
from .rerank import take

CARD = Card(
    id="sora",
    kind="adapter",
    summary="A LoRA whose ranks have gates that a proximal step shuts; shut ranks are left out of what is saved.",
    paper="Sparse Low-rank Adaptation of Pre-trained Language Models",
    year=2023,
    repository="TsinghuaC3I/SoRA",
    equation="y = x Wᵀ + b + s ((x Aᵀ) ⊙ g) Bᵀ; after each update g ← sign(g) max(|g| − ξ, 0)",
    acts_on="matrix",
    flops="4 T n m + 6 T r (n + m) for T tokens, as LoRA",
    claim="better than its baselines with 70 % of the parameters and 70 % of the training time",
    checked=(
        "the proximal step in float64, after each update of a plain loop, of 🤗 Trainer and of a run, also in "
        "bfloat16; with gates of 1 and a tiny ξ it is LoRA; more ξ leaves fewer ranks; PEFT checkpoints without the "
        "shut ranks with equal logits; a run that drops them computes what one that only shuts them does, to "
        "rounding, and goes on to the same bits when it is interrupted; effect not shown. SmolLM2-135M-Instruct at "
        "rank 16, rates tuned alike, two seeds, held-out loss: 0.289 ± 0.065 on invented facts, LoRA 0.317 ± 0.079, "
        "difference 0.0 [−1.3, +1.2] (studies/adapters-facts/report.json); 0.744 ± 0.023 on family relations, LoRA "
        "0.688 ± 0.007, +0.1 [−2.9, +3.0] (studies/adapters-family/report.json)"
    ),
    evidence=("studies/adapters-facts/report.json", "studies/adapters-family/report.json"),
    departures=(
        "released code sets to zero what is still below ξ after ξ was taken off, so all below 2 ξ; here it is the true "
        "step. The gates are trained and clipped with A and B, where the paper gives them an optimizer of their own; "
        "to ours they are vectors, so without weight decay, by the rule and rate for vectors (torch's decays whatever "
        "it is given). Dropping ranks in mid-run (prune_every) is ours. No schedule of ξ and no L1 term in the loss, "
        "which released code has as options"
    ),
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "sparse", "proximal", "rank"),
)


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """Hyper-parameters of SoRA; `rank` is that at the start."""

    threshold: float = option(
        3e-4, "ξ, what an update takes off each gate; not multiplied by the learning rate", gt=0, source="released code"
    )
    prune_every: int = option(
        0,
        "updates after which shut ranks are dropped for good, again and again; 0: only where it is saved",
        ge=0,
        source="the paper drops them after training",
    )


class Sora(MadeLora):
    """See the module docstring; `P` has `lora_A` [r, n], `lora_B` [m, r] and `gate` [r]."""

    id = "sora"
    between = True
    config: Config

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        return {**super().shapes(m, n), "gate": (self.config.rank,)}

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        super().init(P, W, noise)
        gate: Any = P.gate
        gate.copy_(torch.empty(gate.shape).normal_(generator=noise))

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        x = F.dropout(x, self.config.dropout, training)
        inside, gate = vectors(linear(x, P.lora_A), P.gate)
        return self.scale * linear(inside * gate.to(inside.dtype), P.lora_B)

    def pair(self, P: Any) -> tuple[Tensor, Tensor]:
        return P.lora_A, P.lora_B * P.gate

    def after_update(self, P: Any) -> None:
        P.gate.copy_(soft_threshold(P.gate, self.config.threshold))

    @property
    def resizes(self) -> bool:
        return self.config.prune_every > 0

    def sizes(self, layers: Layers, step: int, steps: int) -> Mapping[str, int]:
        every = self.config.prune_every
        if not every or step == 0 or step % every:
            return {}
        left = torch.stack([P.gate.count_nonzero() for _, P in layers.values()]).clamp(min=1).tolist()
        return dict(zip(layers, left, strict=True))

    def carry(self, before: Any, after: Any, noise: torch.Generator) -> Mapping[str, Tensor]:
        left = open_ranks(before.gate)
        return {
            key: take(getattr(before, key), getattr(after, key), dim, left)
            for key, dim in (("lora_A", 0), ("lora_B", 1), ("gate", 0))
        }

    def counts(self, layers: Layers) -> Mapping[str, Tensor]:
        return {"ranks": torch.stack([P.gate.count_nonzero() for _, P in layers.values()]).sum()}

    def factors(self, P: Any) -> LoraFactors:
        A, B = self.pair(P)
        left = open_ranks(P.gate)
        return LoraFactors(A[left], self.scale * B[:, left], len(left))


def open_ranks(gate: Tensor) -> Tensor:
    """Which ranks are not shut; where all are, the first one, as PEFT knows no LoRA of rank 0."""
    left = gate.nonzero().flatten()
    return left if len(left) else torch.zeros(1, dtype=torch.int64, device=gate.device)


def soft_threshold(g: Tensor, threshold: float) -> Tensor:
    """sign(g) max(|g| − ξ, 0), which minimises ½ ‖z − g‖² + ξ Σ|z| over z."""
    return F.softshrink(g, threshold)


def build(config: Config) -> Sora:
    return Sora(config)
