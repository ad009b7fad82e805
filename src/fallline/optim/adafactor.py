"""Adafactor: Adam's second moment as the product of a row and a column, no momentum, steps relative to the weights.

With G [m, n], learning rate η, weight decay λ and t from 1:

    matrices   R_i ← β R_i + (1 − β) mean_j G_ij²,   C_j ← β C_j + (1 − β) mean_i G_ij²,   β = 1 − t^τ
               V_ij = R_i C_j / max(mean_i R_i, ε₁)
    vectors    V ← β V + (1 − β) G²
    all        U = G/√max(V, ε₁²)
               W ← (1 − η λ) W − ρ max(ε₂, rms(W)) · U/max(1, rms(U)/d),   ρ = min(η, 1/√t)

This is torch's own. State is m + n numbers of a matrix and one of how many updates there were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..catalog import Card
from ..errors import InputError
from ..options import Options, option
from .base import Named, align_gradients
from .roles import DECAYED, Leaves, Params, leaves

CARD = Card(
    id="adafactor",
    kind="optimizer",
    summary="A second moment factored by rows and columns, steps relative to the weights' size: torch's own.",
    paper="Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    year=2018,
    repository="tensorflow/tensor2tensor",
    equation="V = R Cᵀ/mean(R); W ← W − ρ rms(W) · U/max(1, rms(U)/d), U = G/√V",
    acts_on="matrix",
    state_bytes={"vector": "4 * n + 4", "objective": "4 * n + 4", "any": "4 * (rows + cols) + 4"},
    traffic_bytes={"vector": "20 * n", "objective": "20 * n", "any": "16 * n + 8 * (rows + cols)"},
    workspace_bytes={"any": "8 * n"},
    claim="Transformer on WMT'14 English–German: Adam's BLEU with next to no state",
    checked=(
        "bit for bit torch.optim.Adafactor; 🤗's Adafactor over fifty steps; the equation in float64; effect "
        "at 10 M parameters, 64 steps, rate tuned alike, three seeds: validation loss 6.502 ± 0.043 where "
        "adamw has 6.775 ± 0.040, difference −0.27 [−0.73, +0.18] (studies/optimizers-early/report.json). One"
        " update of a 58 M Llama on two CPU cores: 7.96 ± 21 % of torch's fused AdamW, 1.01 of "
        "torch.optim.Adafactor (python benchmarks/optimizer_step.py elementwise --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_elementwise.json"),
    departures="as torch: ρ is η while that is below 1/√t, then 1/√t; decay goes by η; no momentum; V is kept above "
    "ε₁², where the paper adds ε₁² to G²; more than two dimensions are so many matrices of the last two, where we see "
    "(first, all others) elsewhere; state is in the gradient's dtype; it waits for the device in every step. Unlike "
    "torch: ε₁ is 1e-15, the root of the paper's 1e-30, where torch takes the spacing of the dtype, 1e-7, which for "
    "gradients below 3e-4 in size makes another rule, as R and C fall with G² and what their product is divided by "
    "does not; no weight decay on norms and biases",
    tags=("baseline", "memory", "factored", "adaptive"),
)


@dataclass(frozen=True)
class Config(Options):
    """Adafactor's hyper-parameters."""

    lr: float = option(1e-2, "peak learning rate η, in units of a parameter's rms", gt=0, source="paper; torch")
    beta2_decay: float = option(-0.8, "τ, by which β rises to 1", le=0, source="paper; torch")
    eps: tuple[float, float] = option((1e-15, 1e-3), "ε₁ and ε₂", gt=0, source="paper: 1e-30 is ε₁²")
    clip_threshold: float = option(1.0, "d, largest rms of an update", ge=1, source="paper; torch")
    weight_decay: float = option(0.0, "λ, on matrices, embeddings and head", ge=0, source="paper; torch")


class Adafactor(Named, torch.optim.Adafactor):
    """`torch.optim.Adafactor` with state by name."""

    def __init__(self, found: Leaves, config: Config) -> None:
        super().__init__(
            found,
            "adafactor",
            lambda role: {"weight_decay": config.weight_decay if role in DECAYED else 0.0},
            lr=config.lr,
            beta2_decay=config.beta2_decay,
            eps=config.eps,
            d=config.clip_threshold,
        )
        self.register_step_pre_hook(align_gradients)


def build(config: Config, params: Params, *, seed: int = 0) -> Adafactor:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run; nothing here is random.

    Raises:
        InputError: parameters without names, or in float16.
    """
    found = leaves(params)
    for name, (p, _) in found.trained.items():
        if p.dtype == torch.float16:  # squares of gradients are below its least number, and so is ε₁²
            raise InputError(f"{name!r} is float16, in which adafactor's state would be zero: use float32 or bfloat16")
    return Adafactor(found, config)
