"""A sparse token mask under a loss that compares answers: only tokens that tell them apart shall count.

    μ_t = σ(v · h_t + b) ∈ (0, 1),   log π(y) → Σ_t μ_t log π(y_t),   log π_ref(y) → Σ_t μ_t log π_ref(y_t)
    loss = ℓ(masked chosen, masked rejected) + λ mean_t μ_t

ℓ is any loss of the margin family but `kto`, named by `of`. h_t is the hidden state that the head reads at token t, no
gradient going through it; v and b are trained with the model. Tokens that both answers have in common pull both
log-probabilities the same way, whatever the loss wants; the penalty λ takes out of the comparison what does not pay for
itself. What is a likelihood in ℓ (its terms that are counted by labels) is of whole answers still, and so are |y| and
the metrics.

Training begins with v = 0 and μ = `start`, close to ℓ itself. The mask also learns to look away: from chosen tokens
that fell, and rejected ones that rose. λ sees to that only where it is large enough.

Terms: those of ℓ, and `mask`, the penalty, counted by the labels of both answers. Cost: that of ℓ; and, where ℓ has a
reference, a forward of it *every step*, as single tokens of the reference are not kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..batches import split
from ..catalog import Card
from ..contracts import Batch, Couples, Loss
from ..errors import InputError
from ..options import Options, option
from ..sequences import per_sequence, sequence_counts
from ..step import Run
from ..tokens import IGNORED, token_losses, token_losses_and_hidden
from .inner import inner
from .margin import REFERENCE, Margin, pairs

CARD = Card(
    id="entangle-mask",
    kind="objective",
    summary="A learned sparse mask over the answers' tokens, under dpo or any other loss that compares them.",
    paper="A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement",
    year=2025,
    repository="https://github.com/HumainLab/Understand_MarginPO",
    equation="ℓ(Σ_t μ_t log π(y_t), …) + λ mean_t μ_t, μ_t = σ(v · h_t + b)",
    couples="none",
    needs=("pairs: data preference", "a reference, where the masked loss has one: the model as the run began"),
    flops="a forward under the reference every step, where there is one; the head's logits again in the backward",
    checked=(
        "effect not shown; values and gradients against float64 on full logits for ten losses; μ = 1 and λ = 0 are the "
        "loss itself; packing and accumulation to 1e-6 in float64; per-example norms. On a 1 M "
        "Llama, rates tuned, five seeds: the change of chosen answers when the margin has grown by 10 nats, minus "
        "dpo's, +2.2 [−6.6, 11.1] nats under plain descent, 0.0 [−0.1, 0.1] under AdamW (python "
        "benchmarks/entanglement.py)"
    ),
    evidence=("benchmarks/results/entanglement.json",),
    departures=(
        "the authors' code has neither of the paper's remedies, so this is a reading of it: a linear head on the "
        "hidden states, the mean of μ over all labels of the step as penalty"
    ),
    tags=("preference", "alignment", "margin", "likelihood displacement", "token mask", "sparse"),
)

TOKENS = "reference_token_logp"
"""The column [R, L] float32 with log π_ref of every label, filled in `prepare`."""


@dataclass(frozen=True)
class Config(Options):
    width: int = option(help="the model's hidden size", gt=0)
    of: str = option("dpo", "the loss that is masked: an objective of the margin family", source="paper, section 5.2")
    options: Any = option(None, "the options of that loss, by name; null: its defaults")  # noqa: RUF009
    sparsity: float = option(0.01, "λ, the price of a token", ge=0, source="ours, not tuned")
    start: float = option(0.98, "μ at the first step", gt=0, lt=1, source="ours: as good as the loss itself")

    def check(self) -> None:
        self.masked()

    def masked(self) -> Margin:
        """ℓ.

        Raises:
            InputError: it is none that can be masked, or its options are wrong.
        """
        made = inner(self.of, self.options)
        if not isinstance(made, Margin) or made.columns.keys() - {REFERENCE}:
            raise InputError(
                f"'of' must be a loss of the margin family that asks no more than log π and log π_ref of two answers, "
                f"such as dpo; {self.of!r} is not"
            )
        return made


class EntangleMask(nn.Module):
    """See the module docstring.

    Attributes:
        masked: ℓ. gate: v and b.
    """

    couples: ClassVar[Couples] = "none"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.masked = config, config.masked()
        self.reference = self.masked.reference
        self.gate = nn.Linear(config.width, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, math.log(config.start / (1 - config.start)))

    def token_columns(self, model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Columns [R, L] that `prepare` adds."""
        return {TOKENS: ((), torch.float32)} if self.reference else {}

    def check(self, run: Run) -> None:
        """
        Raises:
            InputError: the hidden size is another; what the masked loss refuses.
        """
        self.masked.check(run)
        model: Any = run.model
        width = model.config.get_text_config().hidden_size
        if width != self.config.width:
            raise InputError(f"objective 'entangle-mask': 'width' must be {width}, this model's hidden size")

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """Add what the reference says of every label."""
        if not self.reference:
            return batch
        assert run.reference is not None, "checked when the run was put together"
        with run.reference.model() as model:
            found = [-token_losses(model, micro).float() for micro in split(batch, run.micro)]
        return batch | {TOKENS: torch.cat([torch.empty_like(batch["labels"], dtype=torch.float32)[:0], *found])}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the masked loss; `mask` [B] int64: the labels of both answers; 0 where one has none."""
        n = sequence_counts(batch)
        return self.masked.count(batch) | {"mask": n.sum(1) * (n > 0).all(1)}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        n = sequence_counts(batch)
        whole = (n > 0).all(1)
        losses, hidden = token_losses_and_hidden(model, batch)
        asked = batch["labels"] != IGNORED
        gated = torch.sigmoid(self.gate(hidden.detach().to(self.gate.weight.dtype))).squeeze(-1)
        mu = torch.where(asked, gated, 0).double()
        logp, ref = -losses.double(), batch[TOKENS].double() if self.reference else torch.zeros_like(mu)

        def of(weight: Tensor | float) -> Any:
            columns = {REFERENCE: per_sequence(weight * ref, batch)} if self.reference else {}
            return pairs(per_sequence(weight * logp, batch), n, columns)

        p, terms = of(1.0), self.masked.terms
        sparse, plain = self.masked.link(of(mu)), self.masked.link(p)
        linked = {term: (sparse if what == "pairs" else plain)[term] for term, what in terms.items()}
        linked["mask"] = self.config.sparsity * per_sequence(mu, batch).sum(1)
        loss = self.masked.answer(linked, p, whole, batch)
        share = batch.get("share/mask")
        if share is not None:
            kept = torch.where(whole, per_sequence(mu.detach(), batch).sum(1), 0)
            loss.metrics["mask_mean"] = (share.double() * kept).sum()
        return loss


def build(config: Config) -> nn.Module:
    return EntangleMask(config)
