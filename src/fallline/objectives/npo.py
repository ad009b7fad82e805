"""Negative preference optimisation: ascent that fades as an answer becomes less likely than it was.

    forget = −γ (2/β) log σ(−β log(π/π_ref)(y_f)),   retain = −α log π(y_r), or α KL(π_ref ‖ π)

The rejected half of DPO. An example's gradient is w ∇log π(y_f) with w = 2 π^β / (π^β + π_ref^β): 1 at the start, 0 in
the end, so the loss is bounded below and what is forgotten is left alone. β → 0 is gradient ascent on sums. The value
is (2/β) log 2 at the start, so that those of different β cannot be compared.

Cost: see `forgetting`; the reference; with `keep: kl` also `divergence`, in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..options import Options, option
from .forgetting import REFERENCE, Forgetting, Told

CARD = Card(
    id="npo",
    kind="objective",
    summary="Negative preference optimisation: unlearning by an ascent that fades with distance from a reference.",
    paper="Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
    year=2024,
    repository="https://github.com/licong-lin/negative-preference-optimization",
    equation="−(2/β) log σ(−β log(π/π_ref)(y_f)) − α log π(y_r)",
    couples="none",
    needs=(
        "streams: data unlearning, with something to keep unless retain is 0",
        "a reference: the model as the run began",
    ),
    flops="a forward of each example to forget under the reference, once; the head's logits again in the backward",
    claim="collapse is exponentially slower than with gradient ascent; on TOFU, first sound results at 50 % forgotten",
    checked=(
        "equation and slopes against a float64 reference; TRL's DPOTrainer with the chosen ratio at 0, times 2/β, to "
        "1e-5 in float32; β → 0 is ascent; (2/β) log 2 at π = π_ref; packing and accumulation to 1e-6 in float64. A 1 "
        "M Llama that knows invented people, rates tuned alike, three seeds: right answers left when forgotten, 3 % to "
        "forget, 23 [13, 38] % of what it keeps, 20 [18, 22] % of people that unlearning never saw; a model retrained "
        "without them 3, 98, 96 % (python benchmarks/unlearning.py). SmolLM2-135M with a LoRA, two seeds: 8, 42 [25, "
        "58], 17 [8, 25] %; retrained 10, 98, 100 % (python benchmarks/unlearning.py smollm2)"
    ),
    evidence=("benchmarks/results/unlearning.json", "benchmarks/results/unlearning_smollm2.json"),
    departures=(
        "with keep: kl the divergence is at labels only, and a mean over those of the step; the authors' code sums it "
        "over prompts and padding too. The likelihood is a mean over the step's labels, not a micro-batch's"
    ),
    tags=("unlearning", "forgetting", "preference", "reference", "retain", "tofu"),
)


@dataclass(frozen=True)
class Config(Options):
    beta: float = option(0.1, "β, how soon the ascent fades", gt=0, source="paper, TOFU")
    forget: float = option(1.0, "γ, the weight of forgetting", gt=0, source="the authors' code")
    retain: float = option(1.0, "α, the weight of what is kept; 0: nothing is", ge=0, source="the authors' code")
    keep: Literal["likelihood", "kl"] = option(
        "likelihood",
        "what is kept: the likelihood of the examples, or the distributions of the reference at their labels",
        source="the paper's NPO+RT; kl is NPO+KL",
        used_if=("'retain' is above 0", lambda c: c.retain > 0),
    )


def losses(told: Told, beta: float) -> Tensor:
    """[B], before γ."""
    return -2 / beta * F.logsigmoid(beta * (told.s + told.logp_ref))


class NPO(Forgetting):
    """See the module docstring."""

    terms: ClassVar = {"forget": "examples"}
    reference: ClassVar[bool] = True
    columns: ClassVar[dict[str, tuple[int, ...]]] = {REFERENCE: ()}

    def link(self, told: Told) -> dict[str, Tensor]:
        return {"forget": self.config.forget * losses(told, self.config.beta)}


def build(config: Config) -> nn.Module:
    return NPO(config, keep=config.retain, divergence=config.retain > 0 and config.keep == "kl")
