"""R-DPO: DPO that does not pay for length.

    value = −log σ(βΔ + α(|y_w| − |y_l|))

The reward loses α for each token, so that a chosen answer which is merely longer counts as ordered already and teaches
less; a shorter one teaches more.

Cost: see `margin`; and the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .margin import Margin, Pairs, logistic

CARD = Card(
    id="rdpo",
    kind="objective",
    summary="DPO regularised by length: a pair that differs in length counts as ordered so far.",
    paper="Disentangling Length from Quality in Direct Preference Optimization",
    year=2024,
    equation="−log σ(βΔ + α(|y_w| − |y_l|))",
    couples="none",
    needs=("pairs: data preference", "a reference: the model as the run began"),
    flops="a forward of each pair under the reference, once; the head's logits a second time in the backward",
    checked="effect not shown; equation and slopes against a reference of its own; DPO for answers of one length",
    tags=("preference", "alignment", "margin", "reference", "length"),
)


@dataclass(frozen=True)
class Config(Options):
    beta: float = option(0.1, "β, how much a step away from the reference is worth", gt=0, source="as dpo")
    alpha: float = option(
        0.01, "α, what a token costs", gt=0, source="paper, Anthropic HH: 0.005 to 0.01; 0.2 for the short TL;DR"
    )


def losses(p: Pairs, beta: float, alpha: float) -> Tensor:
    """[B], see the module docstring."""
    return logistic(beta * p.delta + alpha * (p.n_w - p.n_l))


class RDPO(Margin):
    """See the module docstring."""

    reference: ClassVar[bool] = True

    def link(self, p: Pairs) -> dict[str, Tensor]:
        return {"pair": losses(p, self.config.beta, self.config.alpha)}


def build(config: Config) -> nn.Module:
    return RDPO(config)
