"""KTO on pairs: each answer by itself is worth more or less than the model's usual distance from the reference.

    chosen = λ_D (1 − σ(β(r_w − z₀)))/2,   rejected = λ_U (1 − σ(β(z₀ − r_l)))/2
    z₀ = max(0, mean over the step's pairs of log(π/π_ref)(an answer | another pair's prompt))

Kahneman and Tversky's value function: losses and gains saturate on both sides of a point z₀, here an estimate of
KL(π ‖ π_ref) that no gradient goes through. The answers in it are those of the pair half the data set away, so that the
estimate does not depend on how the step is cut, and its reference is cached like any other. It is a column, filled for
the whole step in `prepare`; no pair looks at another after that. An evaluation goes through its data by micro-batches,
and z₀ is each one's own; of data of one pair, which has no other's prompt, it is 0.

Cost: see `margin`; the reference; and one more forward of each pair, without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..batches import split
from ..catalog import Card
from ..contracts import Batch, Draw
from ..errors import InputError
from ..noise import rng
from ..options import Options, option
from ..ranks import all_sum
from ..reference import alone, asking
from ..sequences import sequence_logps
from ..step import Run
from ..tokens import IGNORED
from .margin import TERMS, Margin, Pairs

CARD = Card(
    id="kto",
    kind="objective",
    summary="Kahneman-Tversky optimisation: each answer against the model's mean distance from the reference.",
    paper="KTO: Model Alignment as Prospect Theoretic Optimization",
    year=2024,
    repository="https://github.com/ContextualAI/HALOs",
    equation="λ_D(1 − σ(β(r_w − z₀))) + λ_U(1 − σ(β(z₀ − r_l)))",
    couples="none",
    needs=("pairs: data preference", "a reference: the model as the run began", "at least two pairs"),
    flops="one more forward of each pair, and one under the reference; the head's logits again in the backward",
    checked=(
        "effect not shown; values and gradients agree with TRL's KTOTrainer to 1e-5 in float32 on ragged pairs, given "
        "the same mismatched answers; (λ_D + λ_U)/4 at π = π_ref; packing and accumulation to 1e-6 in float64"
    ),
    departures=(
        "pairs only: the paper's answers need no partner, and here each side counts half, as in TRL for equally many. "
        "z₀ is the mean over the step with dropout off, in an evaluation over `micro` rows, on which val_loss depends; "
        "TRL's is over a micro-batch, of answers rolled within it"
    ),
    tags=("preference", "alignment", "reference", "prospect theory", "desirable", "undesirable"),
)

Z = "kto_z"
"""The column [B] float64 with z₀."""

PADS = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "side": -1}
"""Columns of rows that are made here, and what fills them up."""


@dataclass(frozen=True)
class Config(Options):
    beta: float = option(0.1, "β, how soon value saturates", gt=0, source="paper; TRL 1.16")
    desirable: float = option(1.0, "λ_D, the weight of chosen answers", ge=0, source="paper; TRL 1.16")
    undesirable: float = option(1.0, "λ_U, the weight of rejected answers", ge=0, source="paper; TRL 1.16")


def losses(p: Pairs, z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The chosen answers' part [B] and the rejected ones', before λ."""
    return torch.sigmoid(beta * (z - p.r_w)) / 2, torch.sigmoid(beta * (p.r_l - z)) / 2


class KTO(Margin):
    """See the module docstring."""

    terms: ClassVar[TERMS] = {"chosen": "pairs", "rejected": "pairs"}
    compares: ClassVar[frozenset[str]] = frozenset()
    reference: ClassVar[bool] = True

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        return super().columns | {Z: ()}

    def check(self, run: Run) -> None:
        super().check(run)
        if len(run.source) < 2:
            raise InputError("kto measures answers to other prompts, and there is one pair only; give more")
        if not run.estimator.repeatable:
            raise InputError("kto's z₀ is a mean over the step's pairs, so that none can be private by itself; use dpo")

    def prepare(self, run: Run, batch: Batch) -> Batch:
        """Add what the reference says of both answers, and z₀."""
        batch = super().prepare(run, batch)
        examples, number = len(batch["example_id"]), len(run.source)
        far = (batch["example_id"].cpu() + number // 2) % number
        other = run.source(Draw(far, torch.ones(examples)), rng(run.seed, run.step, "kto")) | {"example_id": far}
        sums = torch.zeros(2, dtype=torch.float64, device=run.device)
        for part in split(mismatched(batch, other), run.micro) if examples and number > 1 else ():
            ratios = _ratios(run, {name: column.to(run.device) for name, column in part.items()})
            sums += torch.stack([ratios.sum(), torch.full_like(sums[1], ratios.numel())])
        total, answers = all_sum(sums).unbind()
        z = (total / answers.clamp(min=1)).clamp(min=0)
        return batch | {Z: z.repeat(examples)}

    def link(self, p: Pairs) -> dict[str, Tensor]:
        chosen, rejected = losses(p, p.columns[Z], self.config.beta)
        return {"chosen": self.config.desirable * chosen, "rejected": self.config.undesirable * rejected}


def _ratios(run: Run, rows: Batch) -> Tensor:
    """[B, 2] log(π/π_ref) of both answers."""
    assert run.reference is not None, "checked when the run was put together"
    with asking(run.model):
        return sequence_logps(run.model, rows) - run.reference.logps(rows)


def mismatched(batch: Batch, other: Batch) -> Batch:
    """The prompts of one batch with the answers of another, a pair in each row, on the CPU.

    Args:
        batch, other: B pairs each, packed or not. No sequence becomes longer than the rows of `batch`.

    Returns:
        `input_ids`, `labels`, `position_ids`, `side` [B, L'], and `example_id`.
    """
    rows: list[dict[str, Tensor]] = []
    length = batch["input_ids"].shape[1]
    for asked, answered in zip(alone(batch), alone(other), strict=True):
        ids, _, at = _sequence(asked, 0)
        prompt, both = ids[: at + 1], []
        for side in (0, 1):
            ids, labels, at = _sequence(answered, side)
            quiet = torch.full((len(prompt) - 1,), IGNORED)
            tokens = torch.cat([prompt, ids[at + 1 :]])[:length]
            labels = torch.cat([quiet, labels[at:]])[:length]
            both.append((tokens, labels, torch.arange(len(tokens)), torch.full_like(tokens, side)))
        rows.append(dict(zip(PADS, map(torch.cat, zip(*both, strict=True)), strict=True)))
    columns = {name: pad_sequence([row[name] for row in rows], True, pad) for name, pad in PADS.items()}
    return columns | {"example_id": batch["example_id"].cpu()}


def _sequence(example: Batch, side: int) -> tuple[Tensor, Tensor, int]:
    """Tokens and labels of one sequence of an only example, and where the first label stands; the end, if nowhere."""
    here = example["side"][0] == side
    ids, labels = example["input_ids"][0][here], example["labels"][0][here]
    found = (labels != IGNORED).nonzero().flatten()
    return ids, labels, int(found[0]) if len(found) else len(ids) - 1


def build(config: Config) -> nn.Module:
    return KTO(config)
