"""A classifier that is shown the gradients of known members and non-members.

    features of x: for each trained parameter W, log ‖∇_W ℓ(x)‖₂ and a random projection of ∇_W ℓ(x) to 3 dimensions
    score = log-odds of a logistic regression on the standardised features, fitted without x (5 folds)

It answers for an attacker who already knows many members, so it bounds from below what the gradients give away. Scores
of different folds come from different classifiers, which the interval does not know of. Costs one forward and backward
of all examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..catalog import Card
from ..options import Options
from .attack import Floats, Seen, cross_fitted, of_numbers

CARD = Card(
    id="mia-supervised",
    kind="audit",
    summary="Membership by a logistic regression on gradient norms and sketches of every trained parameter.",
    paper="Pandora's White-Box: Increased Training Data Leakage in Open LLMs",
    year=2024,
    repository="safr-ai-lab/pandora_llm",
    equation="score = log-odds(member | log ‖∇_W ℓ‖, S_W ∇_W ℓ for each W), cross-fitted",
    reads=("squared", "sketch"),
    needs=("fallline[audit]: scikit-learn", "at least 5 members and 5 non-members"),
    flops="one forward and backward of the examples, with 3 random projections of each gradient",
    checked="no example scored by a classifier that saw it; an over-trained tiny model leaks, permuted labels do not. "
    "A small Llama, 1000 invented people: AUC 1.000 learned by heart; trained privately at ε = 4, "
    "0.514 [0.489, 0.539] (python benchmarks/membership.py)",
    evidence=("benchmarks/results/membership.json",),
    departures="logistic regression only, without the gradient by the input; norms are logarithms of l2 norms only",
    tags=("privacy", "membership inference", "audit", "gradient", "per-example", "classifier", "sketch"),
)


@dataclass(frozen=True)
class Config(Options):
    """No options."""


class Supervised:
    """See the module docstring."""

    reads: ClassVar[frozenset[str]] = frozenset({"squared", "sketch"})

    def score(self, seen: Seen, member: NDArray[np.bool_]) -> Floats:
        tiny = np.finfo(np.float32).tiny  # a gradient may be 0: that of lora_A while lora_B is
        norms = [0.5 * np.log(np.maximum(squared, tiny)) for squared in seen.squared.values()]
        features = np.column_stack([*norms, *seen.sketch.values()])
        return cross_fitted(of_numbers, features, member)


def build(config: Config) -> Supervised:
    return Supervised()
