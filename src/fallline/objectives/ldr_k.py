"""LDR-k: the mean of the k strongest claims against the label.

    δ_j = z_j − z_label + c·[j ≠ label],   ℓ = max_{p ∈ simplex, p_j ≤ 1/k} Σ_j p_j δ_j = mean of the k largest δ_j
    ∂ℓ/∂z = [j among them] / k − e_label

k = 1 is the hinge loss of Crammer and Singer, k = V the mean of δ. The label itself, δ = 0, is one of the candidates.

One term, `ldr-k`, divided by the labels of the whole step; the columns it reads are those of `per_token`. Cost: that of
`causal` with the k largest of each token's logits in place of the softmax; full logits never exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..catalog import Card
from ..cross_entropy import minus_label
from ..errors import InputError
from ..options import Options, option
from .ldr_kl import lowered
from .per_token import PerToken

CARD = Card(
    id="ldr-k",
    kind="objective",
    summary="Label-distributionally robust loss: the mean of the k strongest claims against the label.",
    paper="Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity",
    year=2023,
    repository="Optimization-AI/ICML2023_LDR",
    equation="ℓ = mean of the k largest δ_j, δ_j = z_j − z_label + c·[j ≠ label]",
    couples="none",
    needs=("labels", "k of at most V"),
    flops="6 N V D for N labels, V words, hidden size D, and the k largest of V for each",
    checked=(
        "values, gradients and Hessian products against float64 on full logits; k = 1 against the hinge loss, k = V "
        "against the mean. Effect not shown: digits with 0 to 60 % of the labels drawn anew, k = 5 of 10, "
        "rates tuned, accuracy − cross-entropy's −15.8 [−19.0, −12.5] to −8.1 [−10.8, −5.4] points (python "
        "benchmarks/noisy_labels.py)"
    ),
    evidence=("benchmarks/results/noisy_labels.json",),
    departures="the authors' repository does not have it: this is the loss of the set p_j ≤ 1/k without regulariser; "
    "logits are taken as they are, without the normalisation of the released losses",
    tags=("noisy labels", "margin", "top-k", "robust", "likelihood"),
)


@dataclass(frozen=True)
class Config(Options):
    k: int = option(help="how many claims are averaged, the label's own among them; at most V", ge=1)
    margin: float = option(0.1, "c, by which the label shall lead", ge=0, source="the released script, of ldr-kl")


class LDRK:
    """ℓ as a `TokenLoss`."""

    def __init__(self, k: int, margin: float) -> None:
        self.k, self.margin = k, margin

    def largest(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest of each row and where they are, [c, k].

        Raises:
            InputError: the model has fewer words.
        """
        if self.k > a.shape[1]:
            raise InputError(f"objective 'ldr-k': 'k' must be at most {a.shape[1]}, the model's words, got {self.k}")
        return torch.topk(a, self.k, 1, sorted=False)

    def plain(self, z: Tensor, y: Tensor) -> Tensor:
        a = lowered(z.clone(), y, self.margin)
        return self.largest(a)[0].mean(1) - a.gather(1, y).squeeze(1)

    def __call__(self, z: Tensor, y: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        a = lowered(z, y, self.margin)
        at_label, (top, where) = a.gather(1, y), self.largest(a)
        value = (top - at_label).mean(1)
        return value, minus_label(a.zero_().scatter_(1, where, 1 / self.k), y) if slope else None


def build(config: Config) -> nn.Module:
    return PerToken("ldr-k", LDRK(config.k, config.margin))
