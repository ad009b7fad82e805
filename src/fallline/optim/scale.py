"""SCALE: gradient descent with every output unit's gradient at unit size, and momentum in the last layer only.

With G [m, n] in PyTorch's layout (m output units), learning rate η and weight decay λ:

    matrices     U_i = G_i / max(rms_j(G_ij), 1e-8)                           one scale per row
    embedding    U_j = G_j / max(rms_i(G_ij), 1e-8)                           one scale per feature, over the vocabulary
    head         B ← β B + (1 − β) G, B = 0 before;  U_i = B_i / max(rms_j(B_ij), 1e-8)
    vectors      U = Adam(G), ε beside the uncorrected root
    all          W ← (1 − η λ) W − η U

State is one average of the head and Adam's moments of the vectors: 4 bytes per float32 parameter of the head, none for
matrices. In one visit, a matrix moves 12 bytes per parameter where AdamW moves 28. A tied embedding is a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..catalog import Card
from ..kernels.row_norm import column_step, row_step
from ..options import Options, option
from .chain import Chain, ChainOptimizer, chain, partition
from .moments import Adam, Ema
from .normalise import SMALLEST, UnitRms
from .roles import Params, Role
from .transform import Members

CARD = Card(
    id="scale",
    kind="optimizer",
    summary="Unit-size gradient per output unit, momentum in the last layer only: nearly stateless.",
    paper="A Minimalist Optimizer Design for LLM Pretraining",
    year=2025,
    repository="OptimAI-Lab/Minimalist_LLM_Pretraining",
    equation="W_i ← W_i − η G_i / rms(G_i); head: G replaced by its average, β = 0.9",
    acts_on="row",
    state_bytes={
        "matrix": "0",
        "embedding": "0",
        "head": "4 * n",
        "vector": "8 * n",
        "adapter": "0",
        "objective": "8 * n",
    },
    traffic_bytes={
        "matrix": "12 * n",
        "embedding": "16 * n",
        "head": "20 * n",
        "vector": "28 * n",
        "adapter": "12 * n",
        "objective": "28 * n",
    },
    workspace_bytes={"matrix": "0", "adapter": "0", "any": "4 * n"},
    claim="Llama 60M to 1B on C4: Adam's perplexity or better with 35 to 45 % of the memory",
    checked="the equation in float64; unit rms of rows and columns; state bytes. Effect, rate tuned alike, three "
    "seeds, python-source: at 1.3 M parameters and 500 steps validation loss 4.649 ± 0.016 where adamw has "
    "4.940 ± 0.014, difference −0.29 [−0.46, −0.12] (studies/optimizers-tiny/report.json); at 10 M and 100 "
    "steps 6.25 ± 0.16 where adamw has 6.59 ± 0.17, difference −0.34 [−1.15, +0.47] "
    "(studies/optimizers-small/report.json). One update of a 58 M Llama on two CPU cores: 0.76 ± 7 % of "
    "torch's fused AdamW (python benchmarks/optimizer_step.py normalised --pairs 15)",
    evidence=(
        "studies/optimizers-tiny/report.json",
        "studies/optimizers-small/report.json",
        "benchmarks/results/optimizer_step_normalised.json",
    ),
    departures="unit rms, as the released code has it, where the text says unit l2 norm; a tied embedding is a head, "
    "where the released code would take it for an embedding and drop the momentum; more than two dimensions are seen "
    "as (first, all others); adapters are treated as matrices, an objective's own parameters as vectors; no weight "
    "decay on vectors",
    tags=("memory", "stateless", "normalisation", "momentum"),
)


@dataclass(frozen=True)
class Config(Options):
    """SCALE's hyper-parameters."""

    lr: float = option(
        1e-3, "peak learning rate η", gt=0, source="released scripts, 60M to 350M; 2e-4 at 1B, 1e-4 at 7B"
    )
    momentum: float = option(0.9, "β, of the head's average", ge=0, lt=1, source="paper; released code")
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="released code")
    vector_lr_ratio: float = option(
        1.0, "learning rate of norms and biases, in units of lr", gt=0, source="released scripts, 60M to 350M; 5 at 1B"
    )
    betas: tuple[float, float] = option(
        (0.9, 0.999), "Adam's β₁ and β₂ for vectors", ge=0, lt=1, source="released code"
    )
    eps: float = option(1e-8, "Adam's ε for vectors", gt=0, source="released code")


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role."""

    def rows(members: Members, lr: float | Tensor, decay: float) -> None:
        for ctx, _ in members:
            row_step(ctx.param, ctx.grad, lr, decay, SMALLEST)

    def columns(members: Members, lr: float | Tensor, decay: float) -> None:
        for ctx, _ in members:
            column_step(ctx.param, ctx.grad, lr, decay, SMALLEST)

    def averaged_rows(members: Members, lr: float | Tensor, decay: float) -> None:
        for ctx, state in members:
            row_step(ctx.param, ctx.grad, lr, decay, SMALLEST, state["ema"]["average"], config.momentum)

    adam = Adam(config.betas, config.eps)
    matrix = chain(UnitRms("row"), fused=rows)
    vector = chain(adam, fused=adam.fused)
    return {
        "matrix": matrix,
        "embedding": chain(UnitRms("column"), fused=columns),
        "head": chain(Ema(config.momentum), UnitRms("row"), fused=averaged_rows),
        "vector": vector,
        "adapter": matrix,
        "objective": vector,
    }


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
    ratio = {"vector": config.vector_lr_ratio, "objective": config.vector_lr_ratio}
    lr = {role: config.lr * ratio.get(role, 1.0) for role in chains}
    return partition(chains)(params, lr=lr, weight_decay=config.weight_decay, seed=seed)
