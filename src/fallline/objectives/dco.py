"""Direct coverage optimisation: raise the chance that at least one of N samples is the answer.

    s_b = Σ_{t ∈ b} w_t · (−log p(label_t)),   p = e^{−s}: the probability of all of an example's labels
    ℓ = −log(1 − (1 − p)^N),   ∂ℓ/∂s = F = N p (1 − p)^{N−1} / (1 − (1 − p)^N)  ∈ (0, 1]

F is near 1 while p < 1/N and falls to 0 beyond: what N samples will find anyway is left alone, where cross-entropy goes
on to certainty. N = 1 is the cross-entropy of whole examples. Where N p < 1e-6 the first terms of the series are used,
ℓ = s − log N + (N − 1) p / 2, since p itself may underflow; everything after the tokens is float64.

One term, `dco`, divided by the number of examples with labels: an example is a row, or a piece of a packed row, and a
`weight` multiplies its ℓ. With `length_norm` each ℓ is divided by its number of labels. Columns as in `per_token`; a
`token_weight` is w_t in s.

Cost: the gradient needs F, which is known when all of an example's tokens are, so the head's logits are formed twice:
8 N V D floating-point operations for N labels, where cross-entropy takes 6. Full logits never exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..catalog import Card
from ..contracts import Batch, Couples, Loss
from ..options import Options, option
from ..tokens import label_counts, per_example, token_losses

CARD = Card(
    id="dco",
    kind="objective",
    summary="Direct coverage optimisation: the chance that one of N samples is right, in place of the likelihood.",
    paper="Rethinking Fine-Tuning when Scaling Test-Time Compute: Limiting Confidence Improves Mathematical Reasoning",
    year=2025,
    repository="allanraventos/refine",
    equation="ℓ = −log(1 − (1 − p)^N), p the probability of all of an example's labels",
    couples="none",
    needs=("labels", "examples that are whole answers: what is cut off is no part of p"),
    flops="8 N V D for N labels, V words, hidden size D",
    claim="higher pass@N on mathematics when N at training is near the number of samples at test time",
    checked=(
        "values, gradients and Hessian products against float64, N = 1 against cross-entropy, 0 < F ≤ 1 and falling in "
        "p, from p that underflows to p = 1. SmolLM2-135M with a LoRA on 72 problems of letter counting, three seeds, "
        "rates tuned: minus cross-entropy's, N = 64 has pass@64 +0.027 [0.023, 0.030] of 0.973, pass@8 −0.098 [−0.126, "
        "−0.069], pass@1 −0.092 [−0.100, −0.084] of 0.220 (studies/pass-at-n/report.json)"
    ),
    evidence=("studies/pass-at-n/report.json",),
    departures="the released default multiplies F by the mean over tokens, here `length_norm: true`; its series near "
    "small p is off by up to 1e-4; it does not drop examples whose F is small",
    tags=("pass@k", "coverage", "test-time compute", "reasoning", "likelihood"),
)

SMALL = 1e-6
"""N p below which the series is used."""


@dataclass(frozen=True)
class Config(Options):
    samples: int = option(256, "N: near the number of samples at test time", ge=1, source="a usual budget of samples")
    length_norm: bool = option(
        False, "divide each example's loss by its number of labels, as the released default does",
        source="the paper's equation is without",
    )  # fmt: skip


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0, and its derivatives without NaN."""
    near = x > -math.log(2)
    close, far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(close)).log(), torch.log1p(-far.exp()))


def coverage_loss(s: Tensor, samples: int) -> Tensor:
    """ℓ = −log(1 − (1 − e^{−s})^N), of any shape.

    Args:
        s: −log p ≥ 0, float64. samples: N.
    """
    small = math.log(samples) - s < math.log(SMALL)
    least = 1e-30  # log(1 − p) at p = 1 has no derivative
    usual = torch.where(small, 1.0, s).clamp(min=least)
    series = s - math.log(samples) + (samples - 1) / 2 * torch.exp(-s)
    return torch.where(small, series, -log1mexp(samples * log1mexp(-usual)))


class Coverage(nn.Module):
    """See the module docstring."""

    couples: ClassVar[Couples] = "none"
    trade_off: ClassVar[tuple[str, str]] = ("pass@1", "pass@64")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """1 for an example with labels, [B] int64."""
        return {"dco": (label_counts(batch) > 0).long()}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        tokens = token_losses(model, batch)
        if "token_weight" in batch:
            tokens = tokens * batch["token_weight"]
        labels = label_counts(batch)
        loss = coverage_loss(per_example(tokens.double(), batch), self.config.samples) * (labels > 0)
        if self.config.length_norm:
            loss = loss / labels.clamp(min=1)
        return Loss({"dco": loss.to(tokens.dtype)})


def build(config: Config) -> nn.Module:
    return Coverage(config)
