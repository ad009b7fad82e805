"""SimPO: the mean log-probability per token as the reward, a margin to reach, and no reference.

    value = −log σ(β(a_w − a_l) − γ),   a = log π(y | x) / |y|

The mean is what generation ranks by, and a long answer is not worth less for its length.

Cost: see `margin`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .margin import Margin, Pairs, logistic

CARD = Card(
    id="simpo",
    kind="objective",
    summary="Simple preference optimisation: mean log-probabilities with a target margin, without a reference.",
    paper="SimPO: Simple Preference Optimization with a Reference-Free Reward",
    year=2024,
    repository="https://github.com/princeton-nlp/SimPO",
    equation="−log σ(β[log π(y_w)/|y_w| − log π(y_l)/|y_l|] − γ)",
    couples="none",
    needs=("pairs: data preference",),
    flops="the head's logits a second time in the backward",
    checked=(
        "effect not shown; values and gradients agree with TRL's CPOTrainer(simpo) to 1e-5 in float32 on ragged pairs"
    ),
    departures=(
        "the authors' code takes γ as a ratio to β, gamma_beta_ratio; γ here is the paper's, as is TRL's simpo_gamma. "
        "TRL's β is 0.1 where none is given"
    ),
    tags=("preference", "alignment", "margin", "reference-free", "length normalisation"),
)


@dataclass(frozen=True)
class Config(Options):
    beta: float = option(2.0, "β, the scale of the reward", gt=0, source="the authors' scripts/simpo_config.py")
    gamma: float = option(
        0.5, "γ, the margin to reach", ge=0, source="the authors' scripts/simpo_config.py: 0.25 times β"
    )


def losses(p: Pairs, beta: float, gamma: float) -> Tensor:
    """[B], see the module docstring."""
    return logistic(beta * (p.a_w - p.a_l) - gamma)


class SimPO(Margin):
    """See the module docstring."""

    def rewards(self, p: Pairs) -> tuple[Tensor, Tensor]:
        return p.a_w, p.a_l

    def link(self, p: Pairs) -> dict[str, Tensor]:
        return {"pair": losses(p, self.config.beta, self.config.gamma)}


def build(config: Config) -> nn.Module:
    return SimPO(config)
