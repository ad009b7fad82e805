"""Predict the next token: the mean negative log-likelihood of the labels.

    value_b = Σ_{t ∈ b} w_t · (−log p(label_t | tokens up to t in b)),   count_b = how many labels of b are not −100

One term, `nll`. The loss of a step is Σ_b weight_b value_b / Σ_b count_b: per token, over the whole step, however it
is cut. Batch columns, R rows of L tokens (R = B unless packed): `input_ids` and `labels` [R, L], labels already shifted
and −100 where nothing is asked; `position_ids` and `segment` [R, L] when packed; `token_weight` [R, L] if wanted, w_t,
which multiplies a token's loss and leaves the count as it is: a weight of 0 mutes a token without making the others
louder.

Cost: the head's products, 6 N V D floating-point operations for N labels, without full logits; see `fallline.tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..catalog import Card
from ..contracts import Batch, Couples, Loss
from ..options import Options
from ..tokens import label_counts, per_example, per_token, token_losses

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


class Causal(nn.Module):
    """See the module docstring."""

    couples: ClassVar[Couples] = "none"

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """How many labels of each example are asked, [B] int64."""
        return {"nll": label_counts(batch)}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        share = per_token(batch["share/nll"], batch) if "share/nll" in batch else None
        weight = batch.get("token_weight")
        if weight is None:
            return Loss({"nll": per_example(token_losses(model, batch, share), batch)})
        values = token_losses(model, batch, None if share is None else share * weight)
        return Loss({"nll": per_example(values * weight, batch)})


def build(config: Config) -> nn.Module:
    return Causal()
