"""Gradient difference: ascent on what is to be forgotten, descent on what is to be kept.

    forget = +γ log π(y_f),   retain = −α log π(y_r),   each counted by its own labels

What is kept holds the model back from ruin where it is asked about things like it. The ascent still has no end.

Cost: see `forgetting`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..catalog import Card
from ..options import Options, option
from .forgetting import Forgetting

CARD = Card(
    id="graddiff",
    kind="objective",
    summary="Gradient difference: cross-entropy on what is to be kept minus that on what is to be forgotten.",
    paper="Continual Learning and Private Unlearning",
    year=2022,
    repository="https://github.com/Cranial-XIX/Continual-Learning-Private-Unlearning",
    equation="+γ log π(y_f) − α log π(y_r)",
    couples="none",
    needs=("streams: data unlearning with something to keep",),
    claim="none of its own: a baseline of the later methods",
    checked=(
        "equation and slopes against a float64 reference; each term is causal's on its stream; packing and "
        "accumulation to 1e-6 in float64; single examples' norms. A 1 M Llama that knows invented people, rates tuned "
        "alike, three seeds: right answers left when forgotten, 5 % to forget, 62 [51, 76] % of what it keeps, 20 [16, "
        "29] % of people that unlearning never saw; a model retrained without them 3, 98, 96 % (python "
        "benchmarks/unlearning.py). SmolLM2-135M with a LoRA, two seeds: 8, 23 [0, 46], 8 [0, 17] %; retrained 10, 98, "
        "100 % (python benchmarks/unlearning.py smollm2)"
    ),
    evidence=("benchmarks/results/unlearning.json", "benchmarks/results/unlearning_smollm2.json"),
    departures="each mean is over the labels of the whole step; open-unlearning takes it over a micro-batch",
    tags=("unlearning", "forgetting", "baseline", "gradient ascent", "retain"),
)


@dataclass(frozen=True)
class Config(Options):
    forget: float = option(1.0, "γ, the weight of the ascent", gt=0, source="open-unlearning; NPO's code for TOFU")
    retain: float = option(1.0, "α, the weight of what is kept", gt=0, source="open-unlearning; NPO's code for TOFU")


def build(config: Config) -> nn.Module:
    return Forgetting(config, multiple=-config.forget, keep=config.retain)
