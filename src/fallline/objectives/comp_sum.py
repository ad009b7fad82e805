"""The comp-sum family: cross-entropy bent by one number τ, so that hard tokens count more, or less.

    s_t = −log p(label_t),   ℓ_τ = ((e^{s})^{1−τ} − 1) / (1 − τ) = expm1((1 − τ) s) / (1 − τ),   ℓ_1 = s
    ∂ℓ_τ/∂z = p^{τ−1} (softmax(z) − e_label)

τ = 0 is the sum-exponential loss 1/p − 1, τ = 1 cross-entropy, 1 < τ < 2 the generalised cross-entropy (1 − p^q) / q
with q = τ − 1, τ = 2 the mean absolute error 1 − p. Below 1, hard tokens count more than in cross-entropy, and s is
held at 30 / (1 − τ): beyond it the loss would pass e³⁰ / (1 − τ), and it has no gradient there. Above 1 they count
less, which is what helps against wrong labels; at p ≈ 1/V nothing is learned, so τ > 1 wants a model that has begun to
learn.

One term, `comp-sum`, divided by the labels of the whole step; the columns it reads are those of `per_token`. Cost: that
of `causal` and one more pass over each chunk of logits; full logits never exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..cross_entropy import nll
from ..options import Options, option
from .per_token import PerToken

CARD = Card(
    id="comp-sum",
    kind="objective",
    summary="Cross-entropy bent by τ: generalised cross-entropy and mean absolute error against wrong labels.",
    paper="Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    year=2023,
    equation="ℓ = expm1((1 − τ) s) / (1 − τ), s = −log p(label)",
    couples="none",
    needs=("labels", "for τ near 2, a model that has begun to learn"),
    flops="6 N V D for N labels, V words, hidden size D, as cross-entropy",
    claim="H-consistency bounds for the family; that of τ = 1 does not depend on the number of classes",
    checked=(
        "values, gradients and Hessian products against float64 on full logits, τ = 1 is causal, the gradient of τ = 2 "
        "equal to that of TRL's dft loss. Digits with 0, 20, 40, 60 % of the labels drawn anew, accuracy − "
        "cross-entropy's, rates tuned: τ = 1.7 −0.5 [−1.0, −0.1], +0.2 [−0.5, 0.9], +2.2 [1.4, 3.0], +2.9 [0.1, 5.7] "
        "points; τ = 2 −0.8 [−1.2, −0.3], +1.3 [0.8, 1.9], no difference shown at 40 and 60 % (python "
        "benchmarks/noisy_labels.py). Effect on language models not shown"
    ),
    evidence=("benchmarks/results/noisy_labels.json",),
    departures="no code of the authors' is known; s is clamped for τ < 1",
    tags=("noisy labels", "generalised cross-entropy", "gce", "mae", "dft", "robust", "likelihood"),
)

MOST = 30.0
"""Of (1 − τ) s."""


@dataclass(frozen=True)
class Config(Options):
    tau: float = option(
        1.7, "0 sum-exponential, 1 cross-entropy, 1 to 2 generalised, 2 mean absolute error", ge=0, le=2,
        source="q = 0.7 of generalised cross-entropy, the usual choice against noisy labels",
    )  # fmt: skip


class CompSum:
    """ℓ_τ as a `TokenLoss`."""

    def __init__(self, tau: float) -> None:
        self.power = 1 - tau

    def of(self, s: Tensor) -> Tensor:
        """ℓ_τ(s), of any shape."""
        return torch.expm1((self.power * s).clamp(max=MOST)) / self.power

    def plain(self, z: Tensor, y: Tensor) -> Tensor:
        return self.of(F.cross_entropy(z, y.squeeze(1), reduction="none"))

    def __call__(self, z: Tensor, y: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        s, g = nll(z, y, slope)
        if g is not None:
            x = self.power * s
            g.mul_(torch.exp(x).masked_fill_(x > MOST, 0).unsqueeze(1))  # p^(τ−1)
        return self.of(s), g


def build(config: Config) -> nn.Module:
    return PerToken("comp-sum", None if config.tau == 1 else CompSum(config.tau))
