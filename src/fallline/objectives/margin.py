"""The margin family: an objective that is a function of the log-probabilities of a chosen and a rejected answer.

    logp_w = Σ_t log π(y_w,t | x, y_w,<t),   r_w = logp_w − logp_w,ref,   a_w = logp_w / |y_w|,   Δ = r_w − r_l

and likewise for the rejected answer l; |y| counts its labels. A method is a function of these, the *link*, and nothing
else differs: where sequences and reference come from, what is counted, what is logged, is here.

Terms are counted once for each pair, but for the likelihood of the chosen answers (`nll`), which is counted by labels.
A pair with an answer without a label has no part in any term.

Cost: one forward and backward of both answers, each with the prompt; with a trained head 8 N V D floating-point
operations for N labels, V words and hidden size D, as the gradient at the values is known only after them. What the
reference costs is in `fallline.reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batches import no_rows
from ..contracts import Batch, Couples, Loss
from ..errors import InputError
from ..sequences import sequence_counts, sequence_logps
from ..step import Run

REFERENCE = "reference_logp"
"""The column [B, 2] float64 with log π_ref of both answers, filled in `prepare`."""

TERMS = dict[str, Literal["pairs", "labels"]]


@dataclass(frozen=True)
class Pairs:
    """What a link sees of B pairs; all [B] float64.

    Attributes:
        logp_w, logp_l: log π of the chosen and the rejected answer.
        n_w, n_l: |y_w| and |y_l|, at least 1.
        ref_w, ref_l: log π_ref; zero where the method has no reference.
        columns: what else `prepare` added.
    """

    logp_w: Tensor
    logp_l: Tensor
    n_w: Tensor
    n_l: Tensor
    ref_w: Tensor
    ref_l: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def r_w(self) -> Tensor:
        return self.logp_w - self.ref_w

    @property
    def r_l(self) -> Tensor:
        return self.logp_l - self.ref_l

    @property
    def delta(self) -> Tensor:
        """Δ."""
        return self.r_w - self.r_l

    @property
    def a_w(self) -> Tensor:
        return self.logp_w / self.n_w

    @property
    def a_l(self) -> Tensor:
        return self.logp_l / self.n_l


def logistic(z: Tensor, smoothing: float = 0.0) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z): the cross-entropy of a label that is wrong with probability ε."""
    return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)


class Margin(nn.Module):
    """Base of the family. A method gives `terms`, `reference` and `link`.

    Attributes:
        terms: term → what of a pair it counts.
        reference: whether the link sees log π_ref.
        compares: the terms in which the one answer's slope comes with the other's; the rest asks something of an answer
            by itself.
    """

    couples: ClassVar[Couples] = "none"
    trade_off: ClassVar[tuple[str, str]] = ("nll", "rejected")
    terms: ClassVar[TERMS] = {"pair": "pairs"}
    reference: ClassVar[bool] = False
    compares: ClassVar[frozenset[str]] = frozenset({"pair"})

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """Columns [B, …] float64 that `prepare` adds, with their shapes beyond B."""
        return {REFERENCE: (2,)} if self.reference else {}

    def link(self, p: Pairs) -> dict[str, Tensor]:
        """term → [B], each pair's part, coefficient included."""
        raise NotImplementedError

    def rewards(self, p: Pairs) -> tuple[Tensor, Tensor]:
        """What the method calls the worth of chosen and rejected, to be compared: r with a reference, else log π."""
        return p.r_w, p.r_l

    def check(self, run: Run) -> None:
        """Refuse data that are no pairs, and a run without the reference that is needed."""
        if "side" not in no_rows(run.source):
            raise InputError(
                "this objective compares a chosen and a rejected answer, and the data has no such pairs; use "
                "data: {name: preference, path: …}"
            )
        if self.reference and run.reference is None:
            raise InputError(
                "this objective compares with the model as the run began: give the run reference=Reference(model, …)"
            )

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """Add what the reference says of both answers."""
        if not self.reference:
            return batch
        assert run.reference is not None, "checked when the run was put together"
        return batch | {REFERENCE: run.reference.logps(batch)}

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """term → [B] int64: 1 for each pair, or the labels of its chosen answer; 0 where an answer has no label."""
        n = sequence_counts(batch)
        whole = (n > 0).all(1)
        by = {"pairs": whole.long(), "labels": n[:, 0] * whole}
        return {term: by[what] for term, what in self.terms.items()}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        n = sequence_counts(batch)
        whole = (n > 0).all(1)
        p = pairs(sequence_logps(model, batch), n, {name: batch[name] for name in self.columns})
        return self.answer(self.link(p), p, whole, batch)

    def answer(self, linked: Mapping[str, Tensor], p: Pairs, whole: Tensor, batch: Batch) -> Loss:
        """The loss.

        Args:
            linked: what the link said, and further terms.
            p: what the metrics are of.
            whole: [B] bool, pairs without an answer that has no label; the others have no part.
            batch: has ``share/TERM``, where somebody asks for metrics.
        """
        value = {term: torch.where(whole, v, 0) for term, v in linked.items()}
        share = next(
            (batch[f"share/{t}"] for t, what in self.terms.items() if what == "pairs" and f"share/{t}" in batch), None
        )
        if share is None:
            return Loss(value)
        value = {term: v.to(share.dtype) for term, v in value.items()}
        return Loss(value, self.metrics(p, torch.where(whole, share, 0).double()))

    @torch.no_grad()
    def metrics(self, p: Pairs, share: Tensor) -> dict[str, Tensor]:
        """Means over the step's pairs; `share` [B]: each one's part."""
        chosen, rejected = self.rewards(p)
        rows = {
            "chosen_logp": p.logp_w,
            "rejected_logp": p.logp_l,
            "reward_margin": chosen - rejected,
            "reward_accuracy": chosen > rejected,
        }
        return {name: (share * row).sum() for name, row in rows.items()}


def pairs(logp: Tensor, n: Tensor, columns: Mapping[str, Tensor]) -> Pairs:
    """What a link sees. A pair with an answer without a label gets values at which every link has a finite slope.

    Args:
        logp: [B, 2]. n: [B, 2] int64. columns: what `prepare` added, by name.
    """
    whole = (n > 0).all(1, keepdim=True)
    logp = torch.where(whole, logp, -1.0)
    ref = torch.where(whole, columns[REFERENCE], -1.0) if REFERENCE in columns else torch.zeros_like(logp)
    n = n.clamp(min=1)
    return Pairs(logp[:, 0], logp[:, 1], n[:, 0].to(logp), n[:, 1].to(logp), ref[:, 0], ref[:, 1], columns)
