"""Predict the next token: the mean negative log-likelihood of the labels.

    value_b = Σ_{t ∈ b} w_t · (−log p(label_t | tokens up to t in b)),   count_b = how many labels of b are not −100

One term, `nll`, divided by the labels of the whole step; the columns it reads are those of `per_token`.

Cost: the head's products, 6 N V D floating-point operations for N labels, without full logits; see `fallline.tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..catalog import Card
from ..options import Options
from .per_token import PerToken

CARD = Card(
    id="causal",
    kind="objective",
    summary="Next-token cross-entropy, averaged over the labels of the whole step.",
    couples="none",
    needs=("labels",),
    flops="6 N V D for N labels, V words, hidden size D: the head in chunks, full logits never exist",
    checked=(
        "values and gradients against float64 cross-entropy on full logits; uneven and packed micro-batches with "
        "masked labels give the gradient of one batch to 1e-6 in float64"
    ),
    tags=("language modelling", "cross-entropy", "pretraining", "fine-tuning"),
)


@dataclass(frozen=True)
class Config(Options):
    """No options."""


class Causal(PerToken):
    """See the module docstring."""

    def __init__(self) -> None:
        super().__init__("nll")


def build(config: Config) -> nn.Module:
    return Causal()
