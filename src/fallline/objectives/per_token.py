"""What the objectives that sum a loss over tokens have in common.

    value_b = Σ_{t ∈ b} w_t · ℓ(logits_t, label_t),   count_b = how many labels of b are not −100

The loss of a step is Σ_b weight_b value_b / Σ_b count_b: per token, over the whole step, however it is cut. Batch
columns, R rows of L tokens (R = B unless packed): `input_ids` and `labels` [R, L], labels already shifted and −100
where nothing is asked; `position_ids` and `segment` [R, L] when packed; `token_weight` [R, L] if wanted, w_t, which
multiplies a token's loss and leaves the count as it is: a weight of 0 mutes a token without making the others louder.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..contracts import Batch, Couples, Loss
from ..tokens import TokenLoss, label_counts, per_example, per_token, token_losses


class PerToken(nn.Module):
    """See the module docstring.

    Args:
        term: the name of its one term.
        rule: ℓ; None is −log p(label).
    """

    couples: ClassVar[Couples] = "none"

    def __init__(self, term: str, rule: TokenLoss | None = None) -> None:
        super().__init__()
        self.term, self.rule = term, rule

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """How many labels of each example are asked, [B] int64."""
        return {self.term: label_counts(batch)}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        asked = batch.get(f"share/{self.term}")
        share = None if asked is None else per_token(asked, batch)
        weight = batch.get("token_weight")
        if weight is None:
            return Loss({self.term: per_example(token_losses(model, batch, share, self.rule), batch)})
        values = token_losses(model, batch, None if share is None else share * weight, self.rule)
        return Loss({self.term: per_example(values * weight, batch)})
