"""Answer with a refusal where something is to be forgotten, as before where it is to be kept.

    forget = −γ log π(y_refusal | x_f),   retain = −α log π(y_r | x_r),   each counted by its own labels

Nothing is made unlikely on purpose: the refusal takes the place of the answer, and what lies behind it may stay. There
is nothing that could run away.

Cost: see `forgetting`. The answers to forget are not asked, and yet run through the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..catalog import Card
from ..options import Options, option
from .forgetting import REFUSAL, Forgetting

CARD = Card(
    id="idk",
    kind="objective",
    summary="Unlearning by fine-tuning on refusals to the prompts of what is to be forgotten.",
    paper="TOFU: A Task of Fictitious Unlearning for LLMs",
    year=2024,
    repository="https://github.com/locuslab/tofu",
    equation="−γ log π(y_refusal) − α log π(y_r)",
    couples="none",
    needs=("streams: data unlearning with refusals and something to keep",),
    claim="none of its own: a baseline of TOFU",
    checked=(
        "equation and slopes against a float64 reference; each term is causal's on its stream; packing and "
        "accumulation to 1e-6 in float64; single examples' norms. A 1 M Llama that knows invented people, rates tuned "
        "alike, three seeds: right answers left when forgotten, 11 % to forget, 96 [93, 100] % of what it keeps, 47 "
        "[42, 58] % of people that unlearning never saw, and forgot enough in two of three runs; a model retrained "
        "without them 3, 98, 96 % (python benchmarks/unlearning.py). SmolLM2-135M with a LoRA, two seeds: 0, 65 [62, "
        "67], 46 [46, 46] %; retrained 10, 98, 100 % (python benchmarks/unlearning.py smollm2)"
    ),
    evidence=("benchmarks/results/unlearning.json", "benchmarks/results/unlearning_smollm2.json"),
    departures=(
        "two means, each over its labels, where TOFU's code takes one over both, so that longer answers weigh more. A "
        "prompt keeps its refusal, where the code draws one each time"
    ),
    tags=("unlearning", "forgetting", "refusal", "i don't know", "retain", "baseline"),
)


@dataclass(frozen=True)
class Config(Options):
    forget: float = option(1.0, "γ, the weight of the refusals", gt=0, source="TOFU's code: both alike")
    retain: float = option(1.0, "α, the weight of what is kept; 0: nothing is", ge=0, source="TOFU's code: both alike")


class IDK(Forgetting):
    """See the module docstring."""

    sides: ClassVar[tuple[int, ...]] = (REFUSAL,)


def build(config: Config) -> nn.Module:
    return IDK(config, multiple=config.forget, keep=config.retain)
