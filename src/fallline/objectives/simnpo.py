"""SimNPO: negative preference optimisation by mean log-probabilities, without a reference.

    forget = −γ (2/β) log σ(β (s̄ − δ)),   s̄ = −log π(y_f)/|y_f|,   retain = −α log π(y_r)

What fades is the ascent on answers that are unlikely per label, where NPO looks at how much less likely they have
become: long answers and those that were unlikely from the start are not pushed on. β → 0 is ascent on means.

Cost: see `forgetting`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .forgetting import Forgetting, Told

CARD = Card(
    id="simnpo",
    kind="objective",
    summary="Simple negative preference optimisation: unlearning by an ascent that fades with the mean probability.",
    paper="Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
    year=2024,
    repository="https://github.com/OPTML-Group/Unlearn-Simple",
    equation="−γ (2/β) log σ(β (−log π(y_f)/|y_f| − δ)) − α log π(y_r)",
    couples="none",
    needs=("streams: data unlearning, with something to keep unless retain is 0",),
    flops="the head's logits a second time in the backward",
    claim="better than NPO on TOFU, MUSE and WMDP, without a reference",
    checked=(
        "equation and slopes against a float64 reference; β → 0 is ascent by length; the value does not change when an "
        "answer's tokens come twice; packing and accumulation to 1e-6 in float64. A 1 M Llama that knows invented "
        "people, rates tuned alike, three seeds: right answers left when forgotten, 11 % to forget, 94 [89, 100] % of "
        "what it keeps, 47 [40, 56] % of people that unlearning never saw, and forgot enough in one of three runs; a "
        "model retrained without them 3, 98, 96 % (python benchmarks/unlearning.py). SmolLM2-135M with a LoRA, two "
        "seeds: 69, 100 [100, 100], 90 [83, 96] %, and never forgot enough in 20 steps; retrained 10, 98, 100 % "
        "(python benchmarks/unlearning.py smollm2)"
    ),
    evidence=("benchmarks/results/unlearning.json", "benchmarks/results/unlearning_smollm2.json"),
    departures=(
        "the likelihood is a mean over the step's labels; the code takes a micro-batch's. The defaults are those of "
        "open-unlearning, and the authors' for a tenth of TOFU; for a twentieth they take β = 2.5, γ = 0.1375"
    ),
    tags=("unlearning", "forgetting", "preference", "reference-free", "retain", "tofu"),
)


@dataclass(frozen=True)
class Config(Options):
    beta: float = option(4.5, "β, how soon the ascent fades", gt=0, source="open-unlearning")
    delta: float = option(
        0.0, "δ, the mean −log p of a label at which half of the ascent is left", ge=0, source="open-unlearning"
    )
    forget: float = option(0.125, "γ, the weight of forgetting", gt=0, source="open-unlearning")
    retain: float = option(1.0, "α, the weight of what is kept; 0: nothing is", ge=0, source="open-unlearning")


def losses(told: Told, beta: float, delta: float) -> Tensor:
    """[B], before γ."""
    return -2 / beta * F.logsigmoid(beta * (told.s / told.n - delta))


class SimNPO(Forgetting):
    """See the module docstring."""

    terms: ClassVar = {"forget": "examples"}

    def link(self, told: Told) -> dict[str, Tensor]:
        return {"forget": self.config.forget * losses(told, self.config.beta, self.config.delta)}


def build(config: Config) -> nn.Module:
    return SimNPO(config, keep=config.retain)
