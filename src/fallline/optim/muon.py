"""Muon: momentum whose singular values are all made equal, so that a hidden matrix moves as far in every direction.

With G [m, n], learning rate η, momentum μ and weight decay λ:

    matrices     B ← μ B + (1 − μ) G, B = 0 before;   U = μ B + (1 − μ) G   (without Nesterov, U = B)
                 W ← (1 − η λ) W − η √max(1, m/n) · polar(U)
    others       W ← (1 − η' λ) W − η' · Adam(G), ε beside the corrected root, η' = `adam_lr_ratio` · η

where polar(U), nearly the U Vᵀ of a singular value decomposition, is a few Newton–Schulz iterations: `fallline.polar`.
`match-rms` takes 0.2 √max(m, n) in place of the square root, which makes updates of the size that AdamW's have, so that
its η and λ can be kept.

State is one average: 4 bytes per float32 parameter of a matrix. A matrix of short side a and long side b costs
5 (4 a² b + 2 a³) operations an update, which is at most 5 a/T of what T tokens cost in it forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..catalog import Card
from ..options import Options, option
from .chain import Chain, ChainOptimizer, chain, partition
from .moments import Adam, Ema, NesterovEma
from .orthogonalise import Orthogonalise
from .roles import Params, Role
from .transform import Members

CARD = Card(
    id="muon",
    kind="optimizer",
    summary="Momentum with its singular values made equal, for hidden matrices; Adam for the rest.",
    paper="Muon: An optimizer for hidden layers in neural networks",
    year=2024,
    repository="KellerJordan/Muon",
    equation="B ← μB + (1 − μ)G; W ← (1 − ηλ)W − η √max(1, m/n) polar(μB + (1 − μ)G)",
    acts_on="matrix",
    state_bytes={"matrix": "4 * n", "adapter": "4 * n", "any": "8 * n"},
    traffic_bytes={"matrix": "20 * n", "adapter": "20 * n", "any": "28 * n"},
    workspace_bytes={
        "matrix": "20 * max(n, 1048576)",
        "adapter": "20 * max(n, 1048576)",
        "any": "0",
    },
    flops="ns_steps · (4a²b + 2a³) for each matrix, a and b its short and long side; ns_steps · 8a³ and 4a²b for every "
    "three of them on a CPU where b ≥ 1.5a",
    claim="NanoGPT speedrun: loss 3.28 on FineWeb after 3.7 billion tokens, where the record before had taken 5",
    checked="the equation in float64; singular values of the update; torch.optim.Muon over fifty steps, exact where "
    "that is kept from rounding to bfloat16; state bytes. Effect, rate tuned alike, three seeds, "
    "python-source, at 1.3 M parameters and 500 steps: as released 5.162 ± 0.019 where adamw has 4.940 ± "
    "0.014, difference +0.22 [+0.05, +0.40]; with scale match-rms and adam_lr_ratio 1 4.223 ± 0.029, "
    "difference −0.72 [−0.96, −0.47] (studies/optimizers-tiny/report.json); the latter at 10 M and 100 steps "
    "5.746 ± 0.045 where adamw has 6.59 ± 0.17, difference −0.84 [−1.67, −0.01] "
    "(studies/optimizers-small/report.json). The matrices of a 58 M Llama on two CPU cores: 0.92 of its "
    "matrix products, 1.83 of torch.optim.Muon, which rounds to bfloat16, 129 times torch's fused "
    "AdamW (python benchmarks/optimizer_step.py orthogonal --pairs 15)",
    evidence=(
        "studies/optimizers-tiny/report.json",
        "studies/optimizers-small/report.json",
        "benchmarks/results/optimizer_step_orthogonal.json",
    ),
    departures="the norm is kept above 1e-7, as torch.optim.Muon has it, where the released code adds 1e-7; float32 "
    "iterates on a CPU, where both have bfloat16; torch.optim.Muon's own η is 0.001 and λ 0.1; Adam's η follows that "
    "of matrices by a fixed ratio; a tied table has Adam; more than two dimensions are seen as (first, all others); "
    "adapters are treated as matrices; queries, keys and values fused in one matrix are made orthogonal together, as "
    "its shape does not tell them apart; no weight decay on vectors",
    tags=("momentum", "orthogonalisation", "spectral", "newton-schulz"),
)

BATCH = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Bytes of matrices of one shape to iterate on at once: on a CPU they should stay in the cache."""


@dataclass(frozen=True)
class Config(Options):
    """Muon's hyper-parameters."""

    lr: float = option(0.02, "peak learning rate η of matrices", gt=0, source="released code")
    momentum: float = option(0.95, "μ", ge=0, lt=1, source="released code")
    nesterov: bool = option(
        True, "look one step ahead", source="released code", used_if=("momentum > 0", lambda c: c.momentum > 0)
    )
    orthogonalise: Literal["newton-schulz", "polar-express"] = option(
        "newton-schulz", "coefficients of the iteration; polar-express is more exact", source="released code"
    )
    ns_steps: int = option(5, "iterations", ge=1, source="released code; the Polar Express paper too")
    scale: Literal["original", "match-rms"] = option(
        "original",
        "size of the update: √max(1, m/n), or 0.2 √max(m, n) to keep AdamW's η and λ",
        source="released code",
    )
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="released code")
    adam_lr_ratio: float = option(
        0.015, "learning rate of what Adam has, in units of lr", gt=0, source="released code: 3e-4 by 0.02"
    )
    betas: tuple[float, float] = option((0.9, 0.95), "Adam's β₁ and β₂", ge=0, lt=1, source="released code")
    eps: float = option(1e-10, "Adam's ε", gt=0, source="released code")


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role."""
    average = (NesterovEma if config.nesterov else Ema)(config.momentum)
    label = type(average).__name__.lower()
    orthogonalise = Orthogonalise(config.orthogonalise, config.ns_steps, config.scale)

    def together(members: Members, lr: float | Tensor, decay: float) -> None:
        for batch in batches(members):
            U = torch.stack([ctx.grad for ctx, _ in batch])
            for u, (ctx, state) in zip(U, batch, strict=True):
                average.update(u, state[label], ctx)
            U = orthogonalise.direction(U).mul_(lr)
            for u, (ctx, _) in zip(U, batch, strict=True):
                if decay:
                    ctx.param.mul_(1 - lr * decay)
                ctx.param.sub_(u)

    adam = Adam(config.betas, config.eps, corrected=True)
    matrix = chain(average, orthogonalise, fused=together)
    rest = chain(adam, fused=adam.fused)
    return {
        "matrix": matrix,
        "embedding": rest,
        "head": rest,
        "vector": rest,
        "adapter": matrix,
        "objective": rest,
    }


def batches(members: Members) -> Iterator[Members]:
    """Members of one shape, dtype and device, as many at a time as `BATCH` allows and at least one."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, (ctx, _) in enumerate(members):
        alike.setdefault((ctx.param.shape, ctx.param.dtype, ctx.param.device), []).append(i)
    for found in alike.values():
        p = members[found[0]][0].param
        size = max(1, BATCH.get(p.device.type, BATCH["cpu"]) // max(1, p.numel() * p.element_size()))
        for start in range(0, len(found), size):
            yield [members[i] for i in found[start : start + size]]


def build(config: Config, params: Params, *, seed: int = 0) -> ChainOptimizer:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run; nothing here is random.

    Raises:
        InputError: parameters without names.
    """
    chains = rules(config)
    lr = {role: config.lr * (1.0 if role in ("matrix", "adapter") else config.adam_lr_ratio) for role in chains}
    return partition(chains)(params, lr=lr, weight_decay=config.weight_decay, seed=seed)
