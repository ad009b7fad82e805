"""RandLoRA: a change of full rank, made of random matrices that are the same for all layers and of trained diagonals.

    ΔW = s B̃ Ã, or its turn where m < n;   Ã_(k b) j = λ_kb A_kj γ_bj,   s = α/r

With d = min(m, n), D = max(m, n) and p = ⌈d/r⌉ matrices of rank r: B̃ [D, p r] and A [r, d] are cut out of one B and
one A, as large as the largest layers need, drawn once from the seed and not part of the state. λ [r, p] = 0 and
γ [p, d] = 1/max(p, d) are trained. The smaller r is, the more parameters there are.

While γ is constant, as at the start, all p matrices share the rows of A and ΔW has rank r only; it is γ's training
that makes it more. Column i of B̃ is B's matrix i // r, row k p + b of Ã has k first: an order that says nothing about
random matrices, but checkpoints hang on it.

Cost: p (r + d) trained parameters for a weight [m, n]; 4 T n m + 4 T p r D + 6 T p r d floating-point operations for
T tokens, more than full fine-tuning; B holds some D d numbers once for the model. Kept for the backward are d numbers a
token, which are the layer's input where n ≤ m.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..kernels.basis_linear import basis, basis_linear
from ..options import option
from .base import Adapter, AdapterOptions, Weight

CARD = Card(
    id="randlora",
    kind="adapter",
    summary="Trains diagonals between random matrices shared by all layers; a change of full rank.",
    paper="RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    year=2025,
    repository="PaulAlbert31/RandLoRA",
    equation="ΔW = s Σ_b B_b Λ_b A Γ_b, A and B random and shared, Λ = 0 and Γ constant at the start",
    acts_on="matrix",
    flops="4 T n m + 4 T p r max(m, n) + 6 T p r min(m, n) for T tokens, p = ⌈min(m, n)/r⌉",
    claim="reduces, sometimes closes, the gap between LoRA and full fine-tuning",
    checked=(
        "values and gradients against the equation in float64, derivatives to second order; PEFT's RandLoraModel over "
        "50 steps to 1e-7; rank r at the start and full after; with r = 1 every change can be made; checkpoints of "
        "either load in the other with equal logits; effect not shown. SmolLM2-135M-Instruct at rank 16, rates tuned "
        "alike, two seeds, held-out loss: on invented facts 0.240 ± 0.046, LoRA 0.317 ± 0.079, difference −0.1 [−3.0, "
        "+2.8], a step takes 2.33 times LoRA's (studies/adapters-facts/report.json); on family relations 0.769 ± "
        "0.049, and 0.758 ± 0.015 at rank 11, which has the number of parameters of LoRA at 16, LoRA 0.688 ± 0.007, "
        "differences +0.1 [−5.4, +5.6] and +0.1 [−2.1, +2.2]; a step takes 2.12 and 2.37 times LoRA's "
        "(studies/adapters-family/report.json)"
    ),
    evidence=("studies/adapters-facts/report.json", "studies/adapters-family/report.json"),
    departures=(
        "random matrices are rounded to what bfloat16 holds, so that they are the same in every dtype. A checkpoint "
        "has them once, where PEFT writes them with each layer; PEFT loads it and warns of keys it misses. PEFT's "
        "checkpoints without them (save_projection=False) and the sparse ones' drawing are left out"
    ),
    tags=("peft", "full rank", "fine-tuning", "parameter-efficient", "random basis", "shared"),
)


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Hyper-parameters of RandLoRA."""

    rank: int = option(32, "r, rank of each random matrix; the smaller, the more parameters", gt=0, source="PEFT")
    alpha: float = option(640.0, "α, strength of the change", gt=0, source="PEFT: twenty times the rank")
    dropout: float = option(0.0, "chance that an entry of the layer's input is hidden", ge=0, lt=1, source="PEFT")


class RandLora(Adapter):
    """See the module docstring; `P` has `lam` [r, p] and `gam` [p, d], and `shared` with A and B.

    Args:
        config: options.
        bases: A [r, d] and B [D, p, r] for the largest layers, where they are not drawn.
    """

    id = "randlora"
    peft_type = "RANDLORA"
    config: Config

    def __init__(self, config: Config, bases: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config)
        self.bases = bases

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        r, d = self.config.rank, min(m, n)
        p = -(-d // r)
        return {"lam": (r, p), "gam": (p, d)}

    def shared(self, sizes: Sequence[tuple[int, int]], noise: torch.Generator) -> Mapping[str, Tensor]:
        return needed(sizes, self.config.rank, noise) if self.bases is None else self.bases

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        own: Any = P
        own.gam.fill_(1 / max(own.gam.shape))

    def outer(self, P: Any, m: int, n: int) -> Tensor:
        """B̃ [D, p r], a view."""
        p: int = P.lam.shape[1]
        B: Tensor = P.shared.B[: max(m, n), :p]
        return B.flatten(1)

    def delta(self, P: Any, W: Weight) -> Tensor:
        m, n = W().shape
        wide = torch.promote_types(P.lam.dtype, torch.float32)
        inner = basis(P.lam.to(wide), P.gam.to(wide), P.shared.A[:, : min(m, n)].to(wide), self.scale)
        change = self.outer(P, m, n).to(wide) @ inner
        return change if n <= m else change.t()

    @property
    def scale(self) -> float:
        """s."""
        return self.config.alpha / self.config.rank

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        m, n = W().shape
        x = F.dropout(x, self.config.dropout, training)
        A, B = P.shared.A[:, : min(m, n)], self.outer(P, m, n).to(x.dtype)
        if n <= m:
            return F.linear(basis_linear(x, P.lam, P.gam, A, self.scale, up=False), B)
        return basis_linear(F.linear(x, B.t()), P.lam, P.gam, A, self.scale, up=True)

    def stored(self, P: Any) -> Mapping[str, Tensor]:
        return {"randlora_lambda": P.lam, "randlora_gamma": P.gam}

    def stored_once(self, P: Any) -> Mapping[str, Tensor]:
        return {"randlora_A": P.shared.A.unsqueeze(1), "randlora_B": P.shared.B}

    def peft_config(self) -> dict[str, Any]:
        c = self.config
        return {"r": c.rank, "randlora_alpha": c.alpha, "randlora_dropout": c.dropout, "save_projection": True}


def room(sizes: Sequence[tuple[int, int]], rank: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Shapes of A and B that weights of these sizes share."""
    m, n = (max(side) for side in zip(*sizes, strict=True))
    small, large = sorted((m, n))
    return (rank, small), (large, -(-small // rank), rank)


def needed(sizes: Sequence[tuple[int, int]], rank: int, noise: torch.Generator) -> dict[str, Tensor]:
    """A and B, uniform with deviation 1. `noise` draws on the CPU."""
    found = {}
    for key, shape in zip(("A", "B"), room(sizes, rank), strict=True):
        t = torch.empty(shape).uniform_(-1, 1, generator=noise)
        found[key] = (t / t.std()).bfloat16().float()
    return found


def build(config: Config) -> RandLora:
    return RandLora(config)
