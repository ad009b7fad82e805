"""CPO: DPO with a flat reference, held by the likelihood of the chosen answers.

    pair = −(1 − ε) log σ(βm) − ε log σ(−βm),   m = log π(y_w) − log π(y_l);   nll = −α log π(y_w), counted by labels

Without a reference there is no second model to ask; the likelihood term keeps the chosen answers from falling with the
rejected ones.

Cost: see `margin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .margin import TERMS, Margin, Pairs, logistic

CARD = Card(
    id="cpo",
    kind="objective",
    summary="Contrastive preference optimisation: the logistic loss without a reference, and the chosen likelihood.",
    paper="Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    year=2024,
    repository="https://github.com/fe1ixxu/ALMA",
    equation="−log σ(β[log π(y_w) − log π(y_l)]) − α log π(y_w)",
    couples="none",
    needs=("pairs: data preference",),
    flops="the head's logits a second time in the backward",
    checked=(
        "effect not shown; values and gradients agree with TRL's CPOTrainer(sigmoid) to 1e-5 in float32 on ragged pairs"
    ),
    departures=(
        "the likelihood is averaged over the labels of the step; TRL averages over those of a micro-batch, so that "
        "accumulation changes it there and not here"
    ),
    tags=("preference", "alignment", "margin", "reference-free", "likelihood", "label smoothing"),
)


@dataclass(frozen=True)
class Config(Options):
    beta: float = option(0.1, "β, the scale of the margin", gt=0, source="paper; TRL 1.16")
    alpha: float = option(1.0, "α, the weight of the chosen answers' likelihood", ge=0, source="paper; TRL 1.16")
    label_smoothing: float = option(
        0.0, "ε, the share of preferences thought to be wrong", ge=0, lt=0.5, source="none in the paper"
    )


def losses(p: Pairs, beta: float, smoothing: float) -> Tensor:
    """[B], the pair's part."""
    return logistic(beta * (p.logp_w - p.logp_l), smoothing)


class CPO(Margin):
    """See the module docstring."""

    terms: ClassVar[TERMS] = {"pair": "pairs", "nll": "labels"}

    def link(self, p: Pairs) -> dict[str, Tensor]:
        c = self.config
        return {"pair": losses(p, c.beta, c.label_smoothing), "nll": -c.alpha * p.logp_w}


def build(config: Config) -> nn.Module:
    return CPO(config)
