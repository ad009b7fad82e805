"""Stochastic gradient descent, with momentum where asked for.

    G ← G + λ W,    B ← μ B + G  (B = G at the first step),    W ← W − η B,    or with Nesterov's  W ← W − η (G + μ B)

element by element. This is torch's own fused SGD: 12 bytes moved and none kept per float32 parameter, 20 and 4 with
momentum. Weight decay is coupled, an addition to the gradient; it acts on matrices, embeddings and the head only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..catalog import Card
from ..options import Options, option
from .base import Named, align_gradients
from .roles import DECAYED, Leaves, Params, leaves

CARD = Card(
    id="sgd",
    kind="optimizer",
    summary="Stochastic gradient descent, plain or with momentum: torch's fused one.",
    paper="A Stochastic Approximation Method",
    year=1951,
    equation="B ← μB + G + λW, W ← W − ηB",
    acts_on="element",
    state_bytes={"any": "4 * n * (momentum > 0)"},
    traffic_bytes={"any": "12 * n + 8 * n * (momentum > 0)"},
    claim="the least that an update can cost",
    checked="bit for bit torch.optim.SGD(fused=True); the equation in float64; learns a tiny Llama. Effect, rate "
    "tuned alike, three seeds, python-source: at 1.3 M parameters and 500 steps validation loss 5.589 ± 0.036"
    " where adamw has 4.940 ± 0.014, difference +0.65 [+0.50, +0.79] (studies/optimizers-tiny/report.json); "
    "at 10 M and 100 steps 6.827 ± 0.045 where adamw has 6.59 ± 0.17, difference +0.24 [−0.52, +1.00] "
    "(studies/optimizers-small/report.json). One update of a 58 M Llama on two CPU cores: 0.47 ± 12 % of "
    "torch's fused AdamW (python benchmarks/optimizer_step.py elementwise --pairs 15)",
    evidence=(
        "studies/optimizers-tiny/report.json",
        "studies/optimizers-small/report.json",
        "benchmarks/results/optimizer_step_elementwise.json",
    ),
    departures="no weight decay on norms and biases; torch decays everything it is given",
    tags=("baseline", "stateless", "momentum", "memory"),
)


@dataclass(frozen=True)
class Config(Options):
    """SGD's hyper-parameters."""

    lr: float = option(0.1, "peak learning rate η", gt=0, source="usual; language models need it tuned")
    momentum: float = option(0.0, "μ", ge=0, lt=1, source="torch")
    nesterov: bool = option(
        False, "look one step ahead", source="torch", used_if=("momentum is above 0", lambda c: c.momentum > 0)
    )
    weight_decay: float = option(0.0, "λ, on matrices, embeddings and head", ge=0, source="torch")


class SGD(Named, torch.optim.SGD):
    """`torch.optim.SGD(fused=True)` with state by name; `foreach` for half precision on a CPU."""

    def __init__(self, found: Leaves, config: Config) -> None:
        # torch 2.13's fused SGD leaves most elements of half-precision parameters on a CPU as they are
        params = [p for p, _ in found.trained.values()]
        broken = any(p.device.type == "cpu" and p.dtype in (torch.bfloat16, torch.float16) for p in params)
        super().__init__(
            found,
            "sgd with momentum" if config.momentum > 0 else "sgd",
            lambda role: {"weight_decay": config.weight_decay if role in DECAYED else 0.0},
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            **{"foreach" if broken else "fused": True},
        )
        self.register_step_pre_hook(align_gradients)
        self.register_step_pre_hook(fill_momentum)


def fill_momentum(optimizer: SGD, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin missing momentum at zero, of which the first step makes G: torch's fused SGD cannot begin some later."""
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is not None and "momentum_buffer" not in optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)


def build(config: Config, params: Params, *, seed: int = 0) -> SGD:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run; nothing here is random.

    Raises:
        InputError: parameters without names.
    """
    return SGD(leaves(params), config)
