"""AdamW: Adam with decoupled weight decay, the usual choice and what others are compared with.

    W ← (1 − η λ) W
    M ← β₁ M + (1 − β₁) G,   V ← β₂ V + (1 − β₂) G²
    W ← W − η · (M/(1 − β₁ᵗ)) / (√(V/(1 − β₂ᵗ)) + ε)

element by element, t from 1. This is torch's own fused AdamW, which runs at the speed of memory: 28 bytes moved and 8
kept per float32 parameter. Weight decay acts on matrices, embeddings and the head, not on norms and biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..catalog import Card
from ..options import Options, option
from .base import Named, align_gradients
from .roles import DECAYED, Leaves, Params, leaves

CARD = Card(
    id="adamw",
    kind="optimizer",
    summary="Adam with decoupled weight decay: torch's fused one.",
    paper="Decoupled Weight Decay Regularization",
    year=2017,
    repository="loshchil/AdamW-and-SGDW",
    equation="W ← (1 − ηλ)W − η M̂/(√V̂ + ε)",
    acts_on="element",
    state_bytes={"any": "8 * n + 4"},
    traffic_bytes={"any": "28 * n"},
    claim="the baseline of the field",
    checked="bit for bit torch.optim.AdamW(fused=True); the equation in float64; learns a tiny Llama. The baseline of"
    " the studies (studies/optimizers-tiny/report.json) (studies/optimizers-small/report.json). One update of"
    " a 58 M Llama on two CPU cores: 1.03 ± 10 % of torch's fused AdamW (python benchmarks/optimizer_step.py "
    "elementwise --pairs 15)",
    evidence=(
        "studies/optimizers-tiny/report.json",
        "studies/optimizers-small/report.json",
        "benchmarks/results/optimizer_step_elementwise.json",
    ),
    departures="no weight decay on norms and biases, as GPT-3 and Llama were trained; torch decays all it is given",
    tags=("adam", "baseline", "adaptive"),
)


@dataclass(frozen=True)
class Config(Options):
    """Adam's hyper-parameters."""

    lr: float = option(1e-3, "peak learning rate η", gt=0, source="usual below 100 M parameters; torch")
    betas: tuple[float, float] = option(
        (0.9, 0.95), "decay of the two moments, β₁ and β₂", ge=0, lt=1, source="GPT-3; Llama"
    )
    eps: float = option(1e-8, "added to the root, ε", gt=0, source="GPT-3; torch")
    weight_decay: float = option(0.1, "λ, on matrices, embeddings and head", ge=0, source="GPT-3; Llama")


class AdamW(Named, torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` with state by name."""

    def __init__(self, found: Leaves, config: Config) -> None:
        super().__init__(
            found,
            "adamw",
            lambda role: {"weight_decay": config.weight_decay if role in DECAYED else 0.0},
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.register_step_pre_hook(align_gradients)


def build(config: Config, params: Params, *, seed: int = 0) -> AdamW:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run; nothing here is random.

    Raises:
        InputError: parameters without names.
    """
    return AdamW(leaves(params), config)
