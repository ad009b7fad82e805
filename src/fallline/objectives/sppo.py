"""SPPO with certain preferences: draw each answer's own log-ratio to a fixed value.

    chosen = (r_w − 1/(2β))²,   rejected = (r_l + 1/(2β))²

A square in each answer alone: the chosen one's likelihood is raised for itself, rather than only above the other's. It
is SPPO's equation 4.7 with probability 1 for the winner and 0 for the loser.

Cost: see `margin`; and the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .margin import TERMS, Margin, Pairs

CARD = Card(
    id="sppo",
    kind="objective",
    summary="Self-play preference optimisation with certain preferences: each log-ratio is drawn to ±1/(2β).",
    paper="Self-Play Preference Optimization for Language Model Alignment",
    year=2024,
    repository="https://github.com/uclaml/SPPO",
    equation="(r_w − 1/(2β))² + (r_l + 1/(2β))²",
    couples="none",
    needs=("pairs: data preference", "a reference: the model as the run began"),
    flops="a forward of each pair under the reference, once; the head's logits a second time in the backward",
    checked=(
        "effect not shown; values and gradients agree with TRL's DPOTrainer(sppo_hard) to 1e-5 in float32 on ragged "
        "pairs; 1/(2β²) at π = π_ref"
    ),
    departures=(
        "preferences are certain, as in TRL; the paper's are probabilities from a preference model, and its rounds of "
        "generation are not made here. The authors' code halves the sum, and their scripts start it with β = 0.001"
    ),
    tags=("preference", "alignment", "margin", "reference", "square", "self-play"),
)


@dataclass(frozen=True)
class Config(Options):
    beta: float = option(
        0.01,
        "β, how strongly the reference holds: log-ratios end at ±1/(2β)",
        gt=0,
        source="the authors' config_full, which their scripts override, see the card",
    )


def losses(p: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """The chosen answers' part [B] and the rejected ones'."""
    end = 1 / (2 * beta)
    return (p.r_w - end).square(), (p.r_l + end).square()


class SPPO(Margin):
    """See the module docstring."""

    terms: ClassVar[TERMS] = {"chosen": "pairs", "rejected": "pairs"}
    compares: ClassVar[frozenset[str]] = frozenset()
    reference: ClassVar[bool] = True

    def link(self, p: Pairs) -> dict[str, Tensor]:
        chosen, rejected = losses(p, self.config.beta)
        return {"chosen": chosen, "rejected": rejected}


def build(config: Config) -> nn.Module:
    return SPPO(config)
