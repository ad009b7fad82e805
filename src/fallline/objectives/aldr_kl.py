"""ALDR-KL: LDR-KL with a temperature for each token, low where the model is sure and high where it is not.

    δ_k = z_k − z_label + c·[k ≠ label],   p_λ = softmax(δ/λ),   KL(λ) = KL(p_λ ‖ uniform)
    ℓ = max_λ  λ (log Σ_k e^{δ_k/λ} − log V) − α log V / (2 λ₀) · (λ − λ₀)²
    at the maximum   λ* = λ₀ (1 − KL(λ*) / (α log V)),   λ₀ (1 − 1/α) ≤ λ* ≤ λ₀,   ∂ℓ/∂z = p_λ* − e_label

λ* is found for each token at each visit by Newton's rule on the line above, from λ₀ down; four steps leave 1e-8 of λ₀
or less, on random logits and where one of 50 000 words stands out, the steepest case.

One term, `aldr-kl`, divided by the labels of the whole step; the columns it reads are those of `per_token`. Cost: that
of `causal` and, for each step of the iteration, some five passes over each chunk of logits; full logits never exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..catalog import Card
from ..cross_entropy import minus_label
from ..options import Options, option
from .ldr_kl import lowered
from .per_token import PerToken

CARD = Card(
    id="aldr-kl",
    kind="objective",
    summary="LDR-KL with a temperature of its own for every token, found anew at each visit.",
    paper="Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity",
    year=2023,
    repository="Optimization-AI/ICML2023_LDR",
    equation="ℓ = max_λ λ (log Σ_k exp(δ_k/λ) − log V) − α log V / (2 λ₀) (λ − λ₀)²",
    couples="none",
    needs=("labels",),
    flops="6 N V D for N labels, V words, hidden size D, and some 5 N V for each step of the iteration",
    claim="consistent and competitive accuracy on 7 data sets under 6 kinds of label noise, against 13 losses",
    checked=(
        "values, gradients and Hessian products against float64 with λ* by bisection; λ* in its interval and "
        "stationary. Digits with 0, 20, 40, 60 % of the labels drawn anew, accuracy − cross-entropy's for λ₀ = 10: "
        "−0.4 [−0.9, 0.1], +7.1 [4.9, 9.2], +15.3 [12.9, 17.6], +21.7 [18.5, 24.9] points at a common rate of 1e-2, "
        "where cross-entropy overfits; rates tuned, no difference shown up to 40 %, −1.8 [−3.1, −0.5] at 60 % (python "
        "benchmarks/noisy_labels.py). Effect on language models not shown"
    ),
    evidence=("benchmarks/results/noisy_labels.json",),
    departures="the released code keeps a table of one temperature an example, a visit old, with probabilities that "
    "leave out the margin and are floored at 1e-5; here λ* is that of the equation, at the present logits, and there "
    "is no state. It also normalises the scores first; here the logits are taken as they are",
    tags=("noisy labels", "margin", "adaptive temperature", "robust", "likelihood"),
)

STEEPEST = 0.9
"""Newton's rule divides by 1 − (slope of the right side), which is held below this: no step goes astray."""


@dataclass(frozen=True)
class Config(Options):
    temperature: float = option(10.0, "λ₀, the highest temperature", gt=0, source="as ldr-kl; try 0.1, 1, 10")
    alpha: float = option(2.0, "α: λ* is at least λ₀ (1 − 1/α)", gt=1, source="the released script")
    margin: float = option(0.1, "c, by which the label shall lead", ge=0, source="the released script")
    iterations: int = option(4, "Newton steps towards λ*", ge=1, source="leaves 1e-8 of λ₀ or less, measured")


class ALDRKL:
    """ℓ as a `TokenLoss`."""

    def __init__(self, temperature: float, alpha: float, margin: float, iterations: int) -> None:
        self.most, self.alpha, self.margin, self.iterations = temperature, alpha, margin, iterations

    def target(self, u: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """λ₀ (1 − KL(λ) / (α log V)) and its derivative by λ, [c, 1].

        Args:
            u: logits less the largest of their row, [c, V]. temperature: λ [c, 1].
        """
        size = math.log(max(2, u.shape[1]))  # of one word KL is 0 anyway
        e = torch.exp(u / temperature)
        total = e.sum(1, keepdim=True)
        e = e * u
        mean = e.sum(1, keepdim=True) / total
        variance = (e * u).sum(1, keepdim=True) / total - mean.square()
        divergence = math.log(u.shape[1]) - total.log() + mean / temperature
        scale = self.most / (self.alpha * size)
        return self.most - scale * divergence, scale * variance / temperature.pow(3)

    @torch.no_grad()
    def solve(self, u: Tensor) -> Tensor:
        """λ*, [c, 1]; u as for `target`."""
        least = self.most * (1 - 1 / self.alpha)
        found = u.new_full((len(u), 1), self.most)
        for _ in range(self.iterations):
            right, slope = self.target(u, found)
            found = (found - (found - right) / (1 - slope.clamp(max=STEEPEST))).clamp(least, self.most)
        return found

    def value(self, log_sum: Tensor, at_label: Tensor, found: Tensor, words: int) -> Tensor:
        """ℓ from log Σ_k exp(u_k/λ), the label's u and λ, all [c, 1]."""
        size = math.log(words)
        penalty = self.alpha * size / (2 * self.most) * (found - self.most).square()
        return (found * (log_sum - size) - at_label - penalty).squeeze(1)

    def plain(self, z: Tensor, y: Tensor) -> Tensor:
        a = lowered(z.clone(), y, self.margin)
        u = a - a.detach().amax(1, keepdim=True)
        found = self.solve(u)
        right, slope = self.target(u, found)
        found = found - (found - right) / (1 - slope.detach().clamp(max=STEEPEST))  # λ* with its derivative
        return self.value(torch.logsumexp(u / found, 1, keepdim=True), u.gather(1, y), found, z.shape[1])

    def __call__(self, z: Tensor, y: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        u = lowered(z, y, self.margin)
        u -= u.amax(1, keepdim=True)
        found, at_label = self.solve(u), u.gather(1, y)
        p = u.div_(found).exp_()
        total = p.sum(1, keepdim=True)
        value = self.value(total.log(), at_label, found, z.shape[1])
        return value, minus_label(p.div_(total), y) if slope else None


def build(config: Config) -> nn.Module:
    return PerToken("aldr-kl", ALDRKL(config.temperature, config.alpha, config.margin, config.iterations))
