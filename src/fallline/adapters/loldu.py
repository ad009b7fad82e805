"""LoLDU: between the triangular factors of the weight, only a diagonal and its scale are trained.

    W = P L D U with partial pivoting;   L_r [m, r] the first columns of P L,   U_r [r, n] the first rows of U
    y = x Wᵀ + b + ((x U_rᵀ) ⊙ (c z − c₀ D_r)) L_rᵀ,   z [r] and c [1], at the start D_r and c₀

L has ones on its diagonal and so has U, whose rows were divided by the pivots D. The model begins as it was, bit for
bit. The r pivots are those of the first r columns, in the order of elimination, not the largest; so that only r columns
have to be factored. A pivot that is nearly zero is set to `SMALL` of U's largest entry before the division, and told.

Cost: r + 1 trained parameters and r (m + n) frozen ones for a weight [m, n]; 4 T n m + 4 T r (n + m) floating-point
operations for T tokens; of a layer's input r numbers a token are kept for the backward.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate import wide
from ..catalog import Card
from ..errors import InputError
from ..options import option
from ..per_example import vectors
from .base import Adapter, AdapterOptions, LoraFactors, Weight

log = logging.getLogger("fallline")

CARD = Card(
    id="loldu",
    kind="adapter",
    summary="Trains the diagonal between the weight's triangular factors; r + 1 parameters a layer.",
    paper="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition",
    year=2024,
    repository="SKDDJ/LoLDU",
    equation="y = x Wᵀ + b + ((x U_rᵀ) ⊙ (c z − c₀ D_r)) L_rᵀ of W = P L D U; z = D_r and c = c₀ at the start",
    acts_on="matrix",
    flops="4 T n m + 4 T r (n + m) for T tokens",
    claim="about as good as its baselines with some 2600 times fewer trained parameters",
    checked=(
        "factors against the whole decomposition, value and gradients in float64; unchanged at the start; pivots of "
        "zero; r + 1 trained parameters; PEFT checkpoints of rank r with equal logits; effect not shown"
    ),
    departures=(
        "the weight stays what it is and c₀ P L D U is subtracted in the forward; released code changes the weight. "
        "c₀ is an option of its own and 1; α/r in released code, which trains c and does not save it. Of its "
        "beginnings for z there is the one that leaves the model unchanged. z and c are vectors to our optimizers, "
        "so without weight decay, and by the rule and rate for vectors"
    ),
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "triangular", "tiny"),
)

SMALL = 1e-6
"""Of U's largest entry before the division: the least size of a pivot."""


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions):
    """Hyper-parameters of LoLDU."""

    rank: int = option(64, "r, length of the trained diagonal", gt=0, source="as lora-xs")
    scale: float = option(1.0, "c₀, the scale at the start", gt=0, source="chosen here, as lora-xs")


class Loldu(Adapter):
    """See the module docstring; `P` has `z` [r], `c` [1] and, frozen, `lower` [m, r], `upper` [r, n], `pivots` [r]."""

    id = "loldu"
    config: Config

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        if self.config.rank > min(m, n):
            raise InputError(
                f"adapter 'loldu' takes 'rank' pivots of a weight, and one of {m} × {n} has {min(m, n)}, "
                f"got 'rank' = {self.config.rank}"
            )
        return {"z": (self.config.rank,), "c": (1,)}

    def frozen(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        r = self.config.rank
        return {"lower": (m, r), "upper": (r, n), "pivots": (r,)}

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        own: Any = P
        lower, pivots, upper = ldu(W().detach().to(own.z.dtype), self.config.rank)
        own.lower.copy_(lower)
        own.upper.copy_(upper)
        own.pivots.copy_(pivots)
        own.z.copy_(pivots)
        own.c.fill_(self.config.scale)

    def diagonal(self, P: Any, z: Tensor, c: Tensor) -> Tensor:
        """c z − c₀ D_r."""
        found: Tensor = c * z - self.config.scale * P.pivots
        return found

    def delta(self, P: Any, W: Weight) -> Tensor:
        dtype = wide(P.lower)
        found: Tensor = (P.lower.to(dtype) * self.diagonal(P, P.z, P.c).to(dtype)) @ P.upper.to(dtype)
        return found

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        inside, z, c = vectors(F.linear(x, P.upper.to(x.dtype)), P.z, P.c)
        return F.linear(inside * self.diagonal(P, z, c).to(inside.dtype), P.lower.to(x.dtype))

    def factors(self, P: Any) -> LoraFactors:
        return LoraFactors(P.upper, P.lower * self.diagonal(P, P.z, P.c), self.config.rank)


def ldu(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first r columns of P L [m, r], the pivots D [r] and the first r rows of U [r, n] of W = P L D U [m, n].

    They depend on the first r columns' elimination alone, so no more is done.
    """
    panel, swaps, _ = torch.linalg.lu_factor_ex(W[:, :rank])  # also where a pivot is zero
    order = list(range(len(W)))
    for i, j in enumerate(swaps.tolist()):  # row i with row j, counted from 1
        order[i], order[j - 1] = order[j - 1], order[i]
    rows = torch.tensor(order, device=W.device)
    left = panel.tril(-1)
    left.diagonal().fill_(1)
    right = torch.linalg.solve_triangular(left[:rank], W[rows[:rank], rank:], upper=False, unitriangular=True)
    upper = torch.cat((panel[:rank].triu(), right), 1)
    pivots = upper.diagonal()
    least = (SMALL * upper.abs().max()).clamp(min=torch.finfo(W.dtype).tiny)
    if float(pivots.abs().min()) < float(least):
        number = int((pivots.abs() < least).sum())
        shape = " × ".join(map(str, W.shape))
        log.warning("adapter 'loldu': %d of %d pivots of a weight of %s are nearly zero", number, rank, shape)
    pivots = torch.where(pivots.abs() < least, torch.copysign(least, pivots), pivots)
    return torch.empty_like(left).index_copy_(0, rows, left), pivots, upper / pivots[:, None]


def build(config: Config) -> Loldu:
    return Loldu(config)
