"""Gradient ascent: make what is to be forgotten unlikely, and look at nothing else.

    forget = +log π(y), counted by labels;   retain = 0: only measured, where the data has something to keep

The oldest baseline. The loss has no lower bound and its gradient does not fade, so the model soon answers nothing any
more, whatever it is asked: stop early.

Cost: see `forgetting`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..catalog import Card
from ..options import Options
from .forgetting import Forgetting

CARD = Card(
    id="ga",
    kind="objective",
    summary="Gradient ascent: unlearning by the negative of cross-entropy on what is to be forgotten.",
    paper="Knowledge Unlearning for Mitigating Privacy Risks in Language Models",
    year=2023,
    repository="https://github.com/joeljang/knowledge-unlearning",
    equation="+log π(y)",
    couples="none",
    needs=("streams: data unlearning",),
    claim="none of its own: the baseline that later methods are compared with, since it ruins the model",
    checked=(
        "equation and slopes against a float64 reference; the gradient is the negative of causal's; packing and "
        "accumulation to 1e-6 in float64; single examples' norms. A 1 M Llama that knows invented people, rates tuned "
        "alike, three seeds: right answers left when forgotten, 0 % to forget, 4 [0, 9] % of what it keeps, 4 [0, 13] "
        "% of people that unlearning never saw; a model retrained without them 3, 98, 96 % (python "
        "benchmarks/unlearning.py). SmolLM2-135M with a LoRA, two seeds: 6, 12 [8, 17], 15 [8, 21] %; retrained 10, "
        "98, 100 % (python benchmarks/unlearning.py smollm2)"
    ),
    evidence=("benchmarks/results/unlearning.json", "benchmarks/results/unlearning_smollm2.json"),
    tags=("unlearning", "forgetting", "baseline", "gradient ascent"),
)


@dataclass(frozen=True)
class Config(Options):
    """No options."""


def build(config: Config) -> nn.Module:
    return Forgetting(config, multiple=-1.0)
