"""ORPO: fine-tune on the chosen answers, and push their odds above those of the rejected ones.

    nll = −log π(y_w), counted by labels;   pair = −λ log σ(o_w − o_l),   o = log(p̄/(1 − p̄)) = a − log(1 − eᵃ)

p̄ = eᵃ is the geometric mean of the tokens' probabilities. There is no reference and no stage of fine-tuning before.

Cost: see `margin`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .margin import TERMS, Margin, Pairs, logistic

CARD = Card(
    id="orpo",
    kind="objective",
    summary="Odds ratio preference optimisation: the chosen likelihood and the odds ratio, in one stage.",
    paper="ORPO: Monolithic Preference Optimization without Reference Model",
    year=2024,
    repository="https://github.com/xfactlab/orpo",
    equation="−log π(y_w) − λ log σ(log odds(y_w) − log odds(y_l))",
    couples="none",
    needs=("pairs: data preference",),
    flops="the head's logits a second time in the backward",
    checked=(
        "effect not shown; the odds term agrees with TRL's ORPOTrainer to 1e-5 in float32 on ragged pairs, values and "
        "gradients; with the likelihood term on pairs whose prompt is one token"
    ),
    departures=(
        "TRL's likelihood term covers the prompt too, and is averaged over a micro-batch; here it covers the chosen "
        "answers, as the paper's equation says, and is averaged over the step. An answer that the model is sure of to "
        "the last bit has infinite odds; they end at p̄ = 1 − 1e−12"
    ),
    tags=("preference", "alignment", "margin", "reference-free", "odds", "likelihood"),
)

SURE = -1e-12
"""Greatest a: beyond it the odds would be infinite."""


@dataclass(frozen=True)
class Config(Options):
    weight: float = option(0.1, "λ, the weight of the odds ratio", gt=0, source="paper; TRL 1.16 calls it beta")


def log_odds(a: Tensor) -> Tensor:
    """log(eᵃ/(1 − eᵃ)) for a < 0, without loss of digits near either end."""
    a = a.clamp(max=SURE)
    near = a > -math.log(2)
    return a - torch.where(near, torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))


def losses(p: Pairs, weight: float) -> Tensor:
    """[B], the pair's part."""
    return weight * logistic(log_odds(p.a_w) - log_odds(p.a_l))


class ORPO(Margin):
    """See the module docstring."""

    terms: ClassVar[TERMS] = {"pair": "pairs", "nll": "labels"}

    def rewards(self, p: Pairs) -> tuple[Tensor, Tensor]:
        return p.a_w, p.a_l

    def link(self, p: Pairs) -> dict[str, Tensor]:
        return {"pair": losses(p, self.config.weight), "nll": -p.logp_w}


def build(config: Config) -> nn.Module:
    return ORPO(config)
