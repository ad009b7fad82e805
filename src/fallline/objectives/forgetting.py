"""The unlearning family: some examples shall become unlikely, others stay as they are.

    s = −Σ_t log π(y_t | x, y_<t)  of an answer y with |y| labels to the prompt x

Two streams, told apart by `domain`, are two terms, each divided by what it counts over the whole step: `forget`, in
which the methods differ, and `retain`, α times −log π by labels, or the divergence from the reference (`divergence`).
With α = 0 `retain` is only measured. An example to forget may have a refusal beside its answer, as a second sequence.

An example to forget without a label where the method asks for one has no part in any term.

Cost: one forward and backward of all sequences. Where the `forget` term is a multiple of the labels' −log p, its
gradient is formed in the forward, 6 N V D floating-point operations for N labels, V words and hidden size D; else 8 N V
D, as it is known only afterwards. What the reference costs is in `fallline.reference` and in `divergence`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..batches import no_rows
from ..contracts import FORGET, RETAIN, Batch, Couples, Loss
from ..errors import InputError
from ..reference import Reference
from ..sequences import per_sequence, sequence_counts
from ..step import Run
from ..tokens import IGNORED, per_token, token_losses
from .divergence import towards

REFERENCE = "reference_logp"
"""The column [B] float64 with log π_ref of the answers to forget, filled in `prepare`."""

ANSWER, REFUSAL = 0, 1
"""Sequences of an example to forget."""


@dataclass(frozen=True)
class Told:
    """What a link sees of B examples; rows that have no part in the term have finite values that lead nowhere.

    Attributes:
        s: [B] float64, of the answer.
        n: [B] float64, |y|, at least 1.
        logp_ref: [B] float64, log π_ref of the answer; zero where the method asks no reference.
        mean_p: [B, 2] float64, the mean probability of a label in the answer and in the refusal.
    """

    s: Tensor
    n: Tensor
    logp_ref: Tensor
    mean_p: Tensor


class Forgetting(nn.Module):
    """Base of the family. A method gives a `multiple` or a `link`.

    Attributes:
        terms: the terms that count what is to be forgotten → what of an example they count.
        sides: which sequences of an example to forget they ask.
        multiple: the term is so many times −log p of its labels; None: it is what `link` says.
        keep: α.
        divergence: keep the distributions of the reference, in place of the likelihood.
        reference: whether the method asks the model as the run began.
    """

    couples: ClassVar[Couples] = "none"
    terms: ClassVar[dict[str, Literal["examples", "labels"]]] = {"forget": "labels"}
    sides: ClassVar[tuple[int, ...]] = (ANSWER,)
    reference: ClassVar[bool] = False
    columns: ClassVar[dict[str, tuple[int, ...]]] = {}
    trade_off: ClassVar[tuple[str, str]] = ("forget/nll", "retain/nll")

    def __init__(
        self, config: Any, *, multiple: float | None = None, keep: float = 0.0, divergence: bool = False
    ) -> None:
        super().__init__()
        self.config, self.multiple, self.keep, self.divergence = config, multiple, keep, divergence
        self._reference: Reference | None = None
        self._keeps = True  # is there anything to measure `retain` on?

    def link(self, told: Told) -> dict[str, Tensor]:
        """term → [B], each example's part, coefficient included."""
        raise NotImplementedError

    def hold(self, reference: Reference) -> None:
        """Take the reference that `forward` asks for distributions."""
        self._reference = reference

    def check(self, run: Run) -> None:
        """Refuse data or a run that lack what the method needs."""
        source: Any = run.source
        if "domain" not in no_rows(source):
            raise InputError(
                "this objective forgets, and the data does not say what; use data: {name: unlearning, forget: …}"
            )
        streams = getattr(source, "streams", None)
        self._keeps = streams is None or any(stream.name == "retain" for stream in streams)
        if self.keep and not self._keeps:
            raise InputError(
                "this objective also keeps, and the data has nothing to keep; give data: {retain: …}, or take an "
                "objective that only forgets (ga, flat), or retain: 0 where it has that option"
            )
        if streams is not None and len(streams) > 1 and not getattr(run.sampler, "by_stream", False):
            raise InputError("this sampler does not give every step its share of each stream; use sampler: uniform")
        if REFUSAL in self.sides and not getattr(source, "paired", True):
            raise InputError("this objective teaches refusals, and the data has none; give data: {refusals: …}")
        if self.reference:
            if run.reference is None:
                raise InputError(
                    "this objective compares with the model as the run began: give the run "
                    "reference=Reference(model, …)"
                )
            self.hold(run.reference)

    def asked(self, batch: Batch) -> Tensor:
        """Labels [R, L], −100 where no term asks."""
        domain, labels = per_token(batch["domain"], batch), batch["labels"]
        side = batch.get("side", torch.zeros_like(labels))
        forget = (domain == FORGET) & torch.stack([side == one for one in self.sides]).any(0)
        return labels.masked_fill(~(forget | (domain == RETAIN)), IGNORED)

    def members(self, batch: Batch, n: Tensor) -> tuple[Tensor, Tensor]:
        """Which examples are to be forgotten, and which kept, [B] bool each. n: [B, 2], what is asked of each."""
        whole = torch.stack([n[:, side] > 0 for side in self.sides]).all(0)
        return (batch["domain"] == FORGET) & whole, batch["domain"] == RETAIN

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """term → [B] int64: labels, or 1 for an example."""
        n = sequence_counts(batch | {"labels": self.asked(batch)})
        forget, retain = self.members(batch, n)
        by = {"examples": forget.long(), "labels": n.sum(1) * forget}
        return {term: by[what] for term, what in self.terms.items()} | {"retain": n.sum(1) * retain}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        asked = self.asked(batch)
        n = sequence_counts(batch | {"labels": asked})
        forget, retain = self.members(batch, n)
        share = self._share(batch, forget, retain)
        if self.divergence:
            kept = (per_token(batch["domain"], batch) == RETAIN) & (asked != IGNORED)
            assert self._reference is not None, "held since the run was put together"
            rule, labels = towards(self._reference, batch, asked, kept)
            tokens = token_losses(model, batch | {"labels": labels}, share, rule)
        else:
            tokens = token_losses(model, batch | {"labels": asked}, share)
        sums = per_sequence(tokens.double(), batch)

        if self.multiple is not None:
            value = {"forget": torch.where(forget, self.multiple * sums.sum(1), 0)}
        else:
            told = self._told(tokens.double(), sums, n, asked, batch, forget)
            value = {term: torch.where(forget, v, 0) for term, v in self.link(told).items()}
        value["retain"] = torch.where(retain, self.keep * sums.sum(1), 0)
        if "share/retain" not in batch:
            return Loss(value)
        value = {term: v.to(batch["share/retain"].dtype) for term, v in value.items()}
        return Loss(value, self._metrics(batch, sums.detach(), n, forget, retain))

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """Add what the reference says of the answers to forget."""
        if REFERENCE not in self.columns:
            return batch
        assert run.reference is not None, "checked when the run was put together"
        labels = self.asked(batch)
        labels = labels.masked_fill(per_token(batch["domain"], batch) != FORGET, IGNORED)
        return batch | {REFERENCE: run.reference.logps(batch | {"labels": labels})[:, ANSWER]}

    def _share(self, batch: Batch, forget: Tensor, retain: Tensor) -> Tensor | None:
        """[R, L] the derivative of the loss by each token's value, where it is known already."""
        if self.multiple is None or "share/forget" not in batch:
            return None
        a, b = (
            torch.where(which, batch[f"share/{term}"], 0) for which, term in ((forget, "forget"), (retain, "retain"))
        )
        return per_token(self.multiple * a + self.keep * b, batch)

    def _told(self, tokens: Tensor, sums: Tensor, n: Tensor, asked: Tensor, batch: Batch, forget: Tensor) -> Told:
        p = per_sequence(torch.exp(-tokens).masked_fill(asked == IGNORED, 0), batch) / n.clamp(min=1)
        s = torch.where(forget, sums[:, ANSWER], 1.0)
        ref = batch.get(REFERENCE, torch.zeros_like(s))
        return Told(
            s,
            n[:, ANSWER].clamp(min=1).to(s),
            torch.where(forget, ref, -1.0),
            torch.where(forget.unsqueeze(1), p, 0.5),
        )

    @torch.no_grad()
    def _metrics(self, batch: Batch, sums: Tensor, n: Tensor, forget: Tensor, retain: Tensor) -> dict[str, Tensor]:
        """Means over the step, each counted as its term is."""
        term, what = next(iter(self.terms.items()))
        each = sums / (n.clamp(min=1) if what == "examples" else 1)
        share = torch.where(forget, batch[f"share/{term}"], 0)
        names = {ANSWER: "forget_nll", REFUSAL: "refusal_nll"}
        found = {names[side]: (share * each[:, side]).sum() for side in self.sides}
        if self._keeps:
            kept = torch.where(retain, batch["share/retain"], 0)
            found["retain_kl" if self.divergence else "retain_nll"] = (kept * sums.sum(1)).sum()
        return found
