"""Direct coverage optimisation step by step: each step of an answer is to be among N samples of that step.

    s_j = Σ_{t ∈ step j} w_t · (−log p(label_t)),   value_b = Σ_{steps j of b} ℓ_N(s_j),   ℓ_N as in `dco`

For proofs and other answers of several steps, each of which has alternatives: N sets how many are kept open at each, so
that an answer of k steps is found among some N^k samples. A step ends with a label that is one of `separators`, token
ids such as that of a line break, and with the example; labels of −100 belong to no step.

One term, `dco-step`, divided by the number of examples with labels, as `dco`, which it is where an example is one step.
Columns as in `per_token`; a `token_weight` is w_t in s. Cost: as `dco`, 8 N V D floating-point operations for N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..catalog import Card
from ..contracts import Batch, Couples, Loss
from ..errors import InputError
from ..options import Options, option
from ..tokens import IGNORED, label_counts, per_example, token_losses
from .dco import coverage_loss

CARD = Card(
    id="dco-step",
    kind="objective",
    summary="Direct coverage optimisation of each step of an answer, such as a line of a proof.",
    paper="Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning",
    year=2025,
    repository="allanraventos/refine",
    equation="ℓ = Σ_j −log(1 − (1 − p_j)^N), p_j the probability of the labels of step j",
    couples="none",
    needs=("labels", "steps that end with a token of their own"),
    flops="8 N V D for N labels, V words, hidden size D",
    checked=(
        "effect not shown; values, gradients and Hessian products against float64, packed and not; one step is dco, "
        "and N = 1 cross-entropy"
    ),
    departures="the released code has no step variant; what ends a step is named here by token ids",
    tags=("pass@k", "coverage", "test-time compute", "proofs", "reasoning", "likelihood"),
)


@dataclass(frozen=True)
class Config(Options):
    samples: int = option(help="N, the alternatives kept open at each step; the paper's ensemble has 1 to 32", ge=1)
    separators: tuple[int, ...] = option(help="token ids that end a step, such as that of a line break", ge=0)

    def check(self) -> None:
        if not self.separators:
            raise InputError("'separators' must name at least one token id; without steps it is the objective 'dco'")


def steps(batch: Mapping[str, Tensor], separators: tuple[int, ...]) -> Tensor:
    """Which step each token belongs to, [R, L] int64: numbers 0 … R·L − 1, of which not all occur; no step has tokens
    of two examples."""
    labels = batch["labels"]
    first = torch.zeros_like(labels, dtype=torch.bool)
    first[:, 1:] = torch.isin(labels[:, :-1], labels.new_tensor(separators))
    if "segment" in batch:
        first[:, 1:] |= batch["segment"][:, 1:] != batch["segment"][:, :-1]
    return first.long().cumsum(1) + labels.shape[1] * torch.arange(len(labels), device=labels.device).unsqueeze(1)


class StepCoverage(nn.Module):
    """See the module docstring."""

    couples: ClassVar[Couples] = "none"
    trade_off: ClassVar[tuple[str, str]] = ("pass@1", "pass@64")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """1 for an example with labels, [B] int64."""
        return {"dco-step": (label_counts(batch) > 0).long()}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        tokens = token_losses(model, batch)
        if "token_weight" in batch:
            tokens = tokens * batch["token_weight"]
        step, asked = steps(batch, self.config.separators).flatten(), (batch["labels"] != IGNORED).double()
        s = tokens.new_zeros(len(step), dtype=torch.float64).index_add(0, step, tokens.double().flatten())
        labels = s.new_zeros(len(step)).index_add(0, step, asked.flatten())
        each = coverage_loss(s, self.config.samples) / labels.clamp(
            min=1
        )  # the loss of a step, dealt out to its labels
        return Loss({"dco-step": per_example(each[step].view_as(asked) * asked, batch).to(tokens.dtype)})


def build(config: Config) -> nn.Module:
    return StepCoverage(config)
