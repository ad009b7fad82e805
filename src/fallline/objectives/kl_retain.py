"""Ascent on what is to be forgotten, while what the model says of the rest stays as it was, word by word.

    forget = +γ log π(y_f),   retain = α Σ_t KL(π_ref(· | t) ‖ π(· | t)),   each counted by its own labels

The reference is the model as the run began. Of its distribution at a label every word counts, where gradient difference
keeps the one that the data shows: a retained answer need not be right, only typical of what is asked.

Cost: see `forgetting`; and `divergence`, in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..catalog import Card
from ..options import Options, option
from .forgetting import Forgetting

CARD = Card(
    id="kl-retain",
    kind="objective",
    summary="Unlearning by gradient ascent that keeps the distributions of the model as the run began elsewhere.",
    paper="TOFU: A Task of Fictitious Unlearning for LLMs",
    year=2024,
    repository="https://github.com/locuslab/tofu",
    equation="+γ log π(y_f) + α KL(π_ref ‖ π) on y_r",
    couples="none",
    needs=("streams: data unlearning with something to keep", "a reference: the model as the run began"),
    flops="a forward of what is kept under the reference, in every step",
    claim="none of its own: a baseline of TOFU",
    checked=(
        "equation and slopes against a float64 reference; the divergence against torch's kl_div; 0 with gradient 0 at "
        "π = π_ref; packing and accumulation to 1e-6 in float64; full logits never exist. A 1 M Llama that knows "
        "invented people, rates tuned alike, three seeds: right answers left when forgotten, 6 % to forget, 36 [27, "
        "47] % of what it keeps, 18 [16, 22] % of people that unlearning never saw; a model retrained without them 3, "
        "98, 96 % (python benchmarks/unlearning.py). SmolLM2-135M with a LoRA, two seeds: 0, 15 [0, 29], 0 [0, 0] %; "
        "retrained 10, 98, 100 % (python benchmarks/unlearning.py smollm2)"
    ),
    evidence=("benchmarks/results/unlearning.json", "benchmarks/results/unlearning_smollm2.json"),
    departures=(
        "the divergence is at labels only, and a mean over those of the step. TOFU's and NPO's code sum it over every "
        "position of a micro-batch, prompts and padding among them, before they divide"
    ),
    tags=("unlearning", "forgetting", "baseline", "gradient ascent", "retain", "reference", "distillation"),
)


@dataclass(frozen=True)
class Config(Options):
    forget: float = option(1.0, "γ, the weight of the ascent", gt=0, source="TOFU's code")
    retain: float = option(1.0, "α, the weight of the divergence", gt=0, source="TOFU's code")


class KLRetain(Forgetting):
    """See the module docstring."""

    reference: ClassVar[bool] = True


def build(config: Config) -> nn.Module:
    return KLRetain(config, multiple=-config.forget, keep=config.retain, divergence=True)
