"""FLAT: learn a refusal and forget the answer as far as an f-divergence between the two asks, from forget data alone.

    template = −g*(P_e),   forget = f*(g*(P_f)),   P = (1/|y|) Σ_t π(y_t | ·): of the refusal e, of the answer f

The variational form of a divergence between the distributions of refusals and of answers, at its best g*, which is
maximised; the weights of learning and forgetting follow from f. P is a mean of probabilities, not of their logarithms,
so that gradients are proportional to p: what is very unlikely already, a refusal at the start too, moves little.

Both terms are counted by examples; `retain` is only measured, where the data has something to keep.

Cost: see `forgetting`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .forgetting import ANSWER, REFUSAL, Forgetting, Told

CARD = Card(
    id="flat",
    kind="objective",
    summary="Forget-only loss adjustment: unlearning by an f-divergence between refusals and answers.",
    paper="LLM Unlearning via Loss Adjustment with Only Forget Data",
    year=2025,
    repository="https://github.com/UCSC-REAL/FLAT",
    equation="−g*(P_e) + f*(g*(P_f)), P the mean probability of a label of the refusal e and of the answer f",
    couples="none",
    needs=("streams: data unlearning with refusals",),
    flops="the head's logits a second time in the backward",
    claim="better forgetting at equal utility than methods with retain data on Harry Potter, MUSE and TOFU",
    checked=(
        "equation and slopes against a float64 reference; f* against the numerical convex conjugate of f, and all "
        "eight signs over (0, 1)²; 0 for equal answers under total variation; packing and accumulation to 1e-6 in "
        "float64. A 1 M Llama that knows invented people, rates tuned alike, three seeds: right answers left when "
        "forgotten, 4 % to forget, 21 [9, 33] % of what it keeps, 19 [16, 22] % of people that unlearning never saw; a "
        "model retrained without them 3, 98, 96 % (python benchmarks/unlearning.py). SmolLM2-135M with a LoRA, two "
        "seeds: 8, 10 [0, 21], 15 [0, 29] %; retrained 10, 98, 100 % (python benchmarks/unlearning.py smollm2)"
    ),
    evidence=("benchmarks/results/unlearning.json", "benchmarks/results/unlearning_smollm2.json"),
    departures=(
        "the authors' code has e^v for e^(−v) in reverse-kl, hellinger and neyman, so that the first two learn what is "
        "to be forgotten and none learns the refusal; here signs are those of the conjugate. Jeffrey's f* is exact, "
        "there a series, 1.3 % off at P = 1. P is the mean over an example's labels, before g*; there over a "
        "micro-batch, with prompts and padding counted"
    ),
    tags=("unlearning", "forgetting", "refusal", "f-divergence", "total variation", "forget-only", "reference-free"),
)

LOG2 = math.log(2)
HALVES = 30
"""Bisections for Jeffrey's conjugate, before the last step of Newton's makes it exact."""


def jeffrey(v: Tensor) -> Tensor:
    """max_u (u v − (u − 1) log u) for v in [0, 1]: with w = 1/u, w + log w = 1 − v and f* = w + 1/w + v − 2."""
    with torch.no_grad():
        low, high = torch.full_like(v, 0.5), torch.ones_like(v)  # 0.567 … 1
        for _ in range(HALVES):
            w = (low + high) / 2
            above = w + w.log() > 1 - v
            low, high = torch.where(above, low, w), torch.where(above, w, high)
        w = (low + high) / 2
    w = w - (w + w.log() - 1 + v) / (1 + 1 / w)
    return w + 1 / w + v - 2


def _tanh(v: Tensor) -> Tensor:
    return torch.tanh(v) / 2


def _fading(v: Tensor) -> Tensor:
    return -torch.expm1(-v)


#: divergence → g* and f*(g*(·)), functions of v = P.
PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "total-variation": (_tanh, _tanh),
    "kl": (lambda v: v, lambda v: torch.exp(v - 1)),
    "pearson": (lambda v: v, lambda v: v * v / 4 + v),
    "jensen-shannon": (lambda v: LOG2 + F.logsigmoid(v), lambda v: v - F.logsigmoid(v) - LOG2),
    "jeffrey": (lambda v: v, jeffrey),
    "reverse-kl": (lambda v: -torch.exp(-v), lambda v: v - 1),
    "hellinger": (_fading, torch.expm1),
    "neyman": (_fading, lambda v: -2 * torch.expm1(-v / 2)),
}


@dataclass(frozen=True)
class Config(Options):
    divergence: Literal[
        "total-variation", "kl", "pearson", "jensen-shannon", "jeffrey", "reverse-kl", "hellinger", "neyman"
    ] = option("total-variation", "f", source="the authors' configuration")


class FLAT(Forgetting):
    """See the module docstring."""

    terms: ClassVar = {"template": "examples", "forget": "examples"}
    sides: ClassVar[tuple[int, ...]] = (ANSWER, REFUSAL)

    def link(self, told: Told) -> dict[str, Tensor]:
        g, conjugate = PAIRS[self.config.divergence]
        return {"template": -g(told.mean_p[:, REFUSAL]), "forget": conjugate(told.mean_p[:, ANSWER])}


def build(config: Config) -> nn.Module:
    return FLAT(config)
