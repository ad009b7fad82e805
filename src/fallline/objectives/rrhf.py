"""RRHF: the answer that is worth more shall be the likelier one per token, and is learned.

    pair = max(0, a_l − a_w),   nll = −log π(y_w), counted by labels,   a = log π(y | x) / |y|

A hinge without a margin: a pair in the right order has no part in it.

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
    id="rrhf",
    kind="objective",
    summary="Rank responses: a hinge between mean log-probabilities without a margin, and the chosen likelihood.",
    paper="RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
    year=2023,
    repository="https://github.com/GanjinZero/RRHF",
    equation="w max(0, a_l − a_w) − log π(y_w)",
    couples="none",
    needs=("pairs: data preference",),
    flops="the head's logits a second time in the backward",
    checked="effect not shown; equation and slopes against a reference of its own, with pairs in either order",
    departures=(
        "two answers a prompt; the paper ranks several. The likelihood is averaged over labels; the authors' code "
        "averages it over padded positions as well, and takes the first prompt's answers for every prompt of a batch"
    ),
    tags=("preference", "alignment", "ranking", "reference-free", "hinge", "likelihood"),
)


@dataclass(frozen=True)
class Config(Options):
    weight: float = option(1.0, "w, the weight of the hinge", gt=0, source="the authors' train.sh")


def losses(p: Pairs, weight: float) -> Tensor:
    """[B], the pair's part."""
    return weight * (p.a_l - p.a_w).relu()


class RRHF(Margin):
    """See the module docstring."""

    terms: ClassVar[TERMS] = {"pair": "pairs", "nll": "labels"}

    def rewards(self, p: Pairs) -> tuple[Tensor, Tensor]:
        return p.a_w, p.a_l

    def link(self, p: Pairs) -> dict[str, Tensor]:
        return {"pair": losses(p, self.config.weight), "nll": -p.logp_w}


def build(config: Config) -> nn.Module:
    return RRHF(config)
