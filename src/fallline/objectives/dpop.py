"""DPOP: DPO in which a chosen answer that becomes less likely than under the reference costs dearly.

    value = −log σ(β(Δ − λ max(0, logp_w,ref − logp_w)))

Answers that share most of their tokens move together, and DPO is content when both fall as long as the rejected one
falls faster. The penalty is off where the chosen answer is at least as likely as it was.

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
    id="dpop",
    kind="objective",
    summary="DPO-positive: a penalty where the chosen answer becomes less likely than under the reference.",
    paper="Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
    year=2024,
    repository="https://github.com/abacusai/smaug",
    equation="−log σ(β(Δ − λ max(0, −r_w)))",
    couples="none",
    needs=("pairs: data preference", "a reference: the model as the run began"),
    flops="a forward of each pair under the reference, once; the head's logits a second time in the backward",
    checked=(
        "effect not shown; equation and slopes against a reference of its own, with the penalty on and off. On a 1 M "
        "Llama, rates tuned, five seeds: the change of chosen answers when the margin has grown by 10 nats, minus "
        "dpo's, +3.3 [−2.4, 8.9] nats under AdamW; not stable under plain descent (python benchmarks/entanglement.py)"
    ),
    evidence=("benchmarks/results/entanglement.json",),
    tags=("preference", "alignment", "margin", "reference", "penalty", "entanglement"),
)


@dataclass(frozen=True)
class Config(Options):
    beta: float = option(0.1, "β, how much a step away from the reference is worth", gt=0, source="as dpo")
    weight: float = option(50.0, "λ, the weight of the penalty", gt=0, source="the authors' models")


def losses(p: Pairs, beta: float, weight: float) -> Tensor:
    """[B], see the module docstring."""
    return logistic(beta * (p.delta - weight * (-p.r_w).relu()))


class DPOP(Margin):
    """See the module docstring."""

    reference: ClassVar[bool] = True

    def link(self, p: Pairs) -> dict[str, Tensor]:
        return {"pair": losses(p, self.config.beta, self.config.weight)}


def build(config: Config) -> nn.Module:
    return DPOP(config)
