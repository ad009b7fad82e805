"""diffGrad: Adam that steps less, down to half, where the gradient hardly changed since the last update.

Element by element, with gradient G, learning rate η, weight decay λ and t from 1:

    M ← β₁ M + (1 − β₁) G,   V ← β₂ V + (1 − β₂) G²
    ξ = 1/(1 + exp(−c)),   c = |G′ − G|,   G′ the gradient of the update before, 0 at first
    W ← (1 − η λ) W − η √(1 − β₂ᵗ)/(1 − β₁ᵗ) · ξ M/(√V + ε)

A change far below one leaves ξ at ½, so that for gradients as small as a language model's this is little but Adam at
half the rate. With ``change: relative``, c = |G′ − G|/(√V + ε) · √(1 − β₂ᵗ), which does not depend on their scale.

State is Adam's moments and G′: 12 bytes per float32 parameter. In one update it moves 36, where AdamW moves 28.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..catalog import Card
from ..kernels.friction_adam import friction_adam_step
from ..kernels.native import in_parallel
from ..options import Options, option
from .adams import FrictionAdam
from .chain import Chain, ChainOptimizer, chain
from .roles import Params
from .transform import Members

CARD = Card(
    id="diffgrad",
    kind="optimizer",
    summary="Adam whose step is halved where the gradient is steady, by a sigmoid of its change.",
    paper="diffGrad: An Optimization Method for Convolutional Neural Networks",
    year=2019,
    repository="shivram1987/diffGrad",
    equation="W ← (1 − ηλ)W − η sigmoid(|G′ − G|) M̂/(√V̂ + ε)",
    acts_on="element",
    state_bytes={"any": "12 * n"},
    traffic_bytes={"any": "36 * n"},
    claim="CIFAR-10 and CIFAR-100, ResNet-50: higher accuracy than Adam, AMSGrad and others",
    checked=(
        "the equation in float64; half of Adam's step for a constant gradient, Adam's for one that changes "
        "much; pytorch_optimizer's DiffGrad over fifty steps. Compared once, by no test: diffGrad_v2.py over "
        "60 steps; effect at 10 M parameters, 64 steps, rate tuned alike, three seeds: validation loss 6.703 "
        "± 0.036 where adamw has 6.775 ± 0.040, difference −0.07 [−0.38, +0.24] (studies/optimizers-"
        "early/report.json). One update of a 58 M Llama on two CPU cores: 1.36 ± 14 % of torch's fused AdamW,"
        " 0.20 of pytorch_optimizer's DiffGrad (python benchmarks/optimizer_step.py elementwise --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_elementwise.json"),
    departures="weight decay is decoupled, where the released code adds λ W to the gradient, and so to the change; "
    "none on vectors. The code the paper was made with keeps no copy of the gradient, so that ξ is ½ always; this is "
    "that of the paper's text and of diffGrad_v2.py. `change: relative` is ours. pytorch_optimizer 3.9 computes ξ and "
    "does not use it",
    tags=("adam", "adaptive", "gradient difference", "friction"),
)


@dataclass(frozen=True)
class Config(Options):
    """diffGrad's hyper-parameters."""

    lr: float = option(1e-3, "peak learning rate η", gt=0, source="released code")
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's β₁ and β₂", ge=0, lt=1, source="released code")
    eps: float = option(1e-8, "Adam's ε, beside the uncorrected root", gt=0, source="released code")
    change: Literal["absolute", "relative"] = option(
        "absolute", "whether the change is divided by the root of the second moment", source="paper; relative is ours"
    )
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="released code")


def rule(config: Config) -> Chain:
    """The method, the same for every role."""
    adam = FrictionAdam(config.betas, config.eps, relative=config.change == "relative")

    def fused(members: Members, lr: float | Tensor, decay: float) -> None:
        tasks = []
        for ctx, state in members:
            own = state["frictionadam"]
            tasks += friction_adam_step(
                ctx.param,
                ctx.grad,
                own["exp_avg"],
                own["exp_avg_sq"],
                own["previous"],
                betas=config.betas,
                eps=config.eps,
                t=adam.age(ctx.step),
                relative=adam.relative,
                lr=lr,
                decay=decay,
            )
        in_parallel(tasks)

    return chain(adam, fused=fused)


def build(config: Config, params: Params, *, seed: int = 0) -> ChainOptimizer:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run; nothing here is random.

    Raises:
        InputError: parameters without names.
    """
    return rule(config)(params, lr=config.lr, weight_decay=config.weight_decay, seed=seed)
