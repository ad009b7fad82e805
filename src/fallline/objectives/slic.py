"""SLiC: a hinge on the two log-probabilities, and the likelihood of the chosen answers.

    pair = max(0, δ − log π(y_w) + log π(y_l));   nll = −λ log π(y_w), counted by labels

A pair that is ordered by more than δ nats teaches nothing more.

Cost: see `margin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .margin import TERMS, Margin, Pairs

CARD = Card(
    id="slic",
    kind="objective",
    summary="Sequence likelihood calibration: a hinge between the log-probabilities, and the chosen likelihood.",
    paper="SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
    year=2023,
    equation="max(0, δ − log π(y_w) + log π(y_l)) − λ log π(y_w)",
    couples="none",
    needs=("pairs: data preference",),
    flops="the head's logits a second time in the backward",
    checked=(
        "effect not shown; with the hinge's β = 1/δ and everything times β, values and gradients agree with TRL's "
        "CPOTrainer(hinge) to 1e-5 in float32 on ragged pairs"
    ),
    departures=(
        "the likelihood is that of the chosen answers; the paper also tries that of the data the model was fine-tuned "
        "on. TRL's DPOTrainer(hinge) compares log-ratios to a reference instead, and has no likelihood"
    ),
    tags=("preference", "alignment", "margin", "reference-free", "hinge", "likelihood"),
)


@dataclass(frozen=True)
class Config(Options):
    delta: float = option(1.0, "δ, the margin in nats beyond which a pair is done", gt=0, source="chosen here")
    anchor: float = option(1.0, "λ, the weight of the chosen answers' likelihood", ge=0, source="chosen here")


def losses(p: Pairs, delta: float) -> Tensor:
    """[B], the pair's part."""
    return (delta - p.logp_w + p.logp_l).relu()


class SLiC(Margin):
    """See the module docstring."""

    terms: ClassVar[TERMS] = {"pair": "pairs", "nll": "labels"}

    def link(self, p: Pairs) -> dict[str, Tensor]:
        return {"pair": losses(p, self.config.delta), "nll": -self.config.anchor * p.logp_w}


def build(config: Config) -> nn.Module:
    return SLiC(config)
