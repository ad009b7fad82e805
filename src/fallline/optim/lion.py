"""Lion: every element moves by the learning rate, in the direction of an average of gradients.

    W ← (1 − η λ) W − η sign(β₁ M + (1 − β₁) G)
    M ← β₂ M + (1 − β₂) G

element by element, M = 0 before. Updates are larger than Adam's: the paper advises a three to ten times smaller η, and
a λ larger by as much. State is M: 4 bytes per float32 parameter. In one update it moves 20, where AdamW moves 28.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..catalog import Card
from ..kernels.lion import lion_step
from ..kernels.native import in_parallel
from ..options import Options, option
from .chain import Chain, ChainOptimizer, chain
from .moments import LionEma
from .normalise import Sign
from .roles import Params
from .transform import Members

CARD = Card(
    id="lion",
    kind="optimizer",
    summary="The sign of an average gradient: one moment, and every element moves alike.",
    paper="Symbolic Discovery of Optimization Algorithms",
    year=2023,
    repository="google/automl",
    equation="W ← (1 − ηλ)W − η sign(β₁M + (1 − β₁)G); M ← β₂M + (1 − β₂)G",
    acts_on="element",
    state_bytes={"any": "4 * n"},
    traffic_bytes={"any": "20 * n"},
    claim="ViT on ImageNet: up to 2 % more accuracy than AdamW's; language models: Adam's loss or better",
    checked=(
        "the equation in float64; pytorch_optimizer's Lion over fifty steps, to the bit. Compared once, by no"
        " test: the released code over fifty steps, to the bit; effect at 10 M parameters, 64 steps, rate "
        "tuned alike, three seeds: validation loss 6.705 ± 0.040 where adamw has 6.775 ± 0.040, difference "
        "−0.07 [−0.47, +0.32] (studies/optimizers-early/report.json). One update of a 58 M Llama on two CPU "
        "cores: 0.88 ± 19 % of torch's fused AdamW, 0.22 of pytorch_optimizer's Lion (python "
        "benchmarks/optimizer_step.py elementwise --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_elementwise.json"),
    departures="no weight decay on norms and biases; the released code decays all it is given. As there, an "
    "element whose gradient once is NaN never moves again, since torch's sign of NaN is zero",
    tags=("momentum", "sign", "memory", "baseline"),
)


@dataclass(frozen=True)
class Config(Options):
    """Lion's hyper-parameters."""

    lr: float = option(1e-4, "peak learning rate η", gt=0, source="released code")
    betas: tuple[float, float] = option(
        (0.9, 0.99), "β₁ of the update and β₂ of the average", ge=0, lt=1, source="paper; (0.95, 0.98) for stability"
    )
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="released code")


def rule(config: Config) -> Chain:
    """The method, the same for every role."""

    def fused(members: Members, lr: float | Tensor, decay: float) -> None:
        steps = (
            lion_step(ctx.param, ctx.grad, state["lionema"]["average"], betas=config.betas, lr=lr, decay=decay)
            for ctx, state in members
        )
        in_parallel([task for tasks in steps for task in tasks])

    return chain(LionEma(config.betas), Sign(), fused=fused)


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
