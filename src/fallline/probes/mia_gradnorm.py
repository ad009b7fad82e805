"""Members have smaller gradients: training has driven them towards zero.

    score = −‖∇_θ ℓ(x)‖₂        ℓ: mean negative log-likelihood of the example's labels; θ: what the run trained

Costs one forward and backward of all examples, with the norm of each by `fallline.per_example`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..catalog import Card
from ..options import Options
from .attack import Floats, Seen

CARD = Card(
    id="mia-gradnorm",
    kind="audit",
    summary="Membership by the norm of an example's gradient: small for what was trained on.",
    paper="Pandora's White-Box: Increased Training Data Leakage in Open LLMs",
    year=2024,
    repository="safr-ai-lab/pandora_llm",
    equation="score = −‖∇ ℓ(x)‖₂ over all trained parameters",
    reads=("squared",),
    flops="one forward and backward of the examples",
    checked="norms against autograd one example at a time; an over-trained tiny model leaks, permuted labels do not. "
    "A small Llama, 1000 invented people: AUC 1.000 learned by heart; trained privately at ε = 4, "
    "0.508 [0.483, 0.534] (python benchmarks/membership.py)",
    evidence=("benchmarks/results/membership.json",),
    departures="the authors' code gives all examples of a batch one gradient; here each has its own",
    tags=("privacy", "membership inference", "audit", "gradient", "per-example"),
)


@dataclass(frozen=True)
class Config(Options):
    """No options."""


class GradNorm:
    """See the module docstring."""

    reads: ClassVar[frozenset[str]] = frozenset({"squared"})

    def score(self, seen: Seen, member: NDArray[np.bool_]) -> Floats:
        return -np.sqrt(np.sum(list(seen.squared.values()), axis=0))


def build(config: Config) -> GradNorm:
    return GradNorm()
