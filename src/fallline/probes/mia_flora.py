"""Members gain most by the training: how much less surprising an example is to the model than to its base.

    score = ℓ_base(x) − ℓ_tuned(x)        ℓ: mean negative log-likelihood of the example's labels

The base says how hard an example is for anybody, which the loss alone cannot tell from not having been seen. Costs two
forwards of all examples; with an adapter, both run on the same weights.
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
    id="mia-flora",
    kind="audit",
    summary="Membership by how much the loss fell between the base model and the trained one (FLoRa).",
    paper="Pandora's White-Box: Increased Training Data Leakage in Open LLMs",
    year=2024,
    repository="safr-ai-lab/pandora_llm",
    equation="score = ℓ_base(x) − ℓ_tuned(x), per label",
    reads=("loss", "base_loss"),
    needs=("the base model, built again by the run's recipe",),
    flops="two forwards of the examples",
    checked="score 0 and AUC 0.5 where nothing was trained; an over-trained tiny model leaks, permuted labels do not. "
    "A small Llama, 1000 invented people: AUC 0.999 learned by heart; trained privately at ε = 4, "
    "0.515 [0.490, 0.540] (python benchmarks/membership.py)",
    evidence=("benchmarks/results/membership.json",),
    tags=("privacy", "membership inference", "audit", "loss ratio", "LoRA", "calibration"),
)


@dataclass(frozen=True)
class Config(Options):
    """No options."""


class Flora:
    """See the module docstring."""

    reads: ClassVar[frozenset[str]] = frozenset({"loss", "base_loss"})

    def score(self, seen: Seen, member: NDArray[np.bool_]) -> Floats:
        return seen.base_loss - seen.loss


def build(config: Config) -> Flora:
    return Flora()
