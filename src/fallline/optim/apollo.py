"""APOLLO: the gradient itself, each channel scaled as Adam in a random subspace would scale it.

With G [m, n], seen as X [b, a] with its long side first, learning rate η, weight decay λ and t from 1:

    every T updates   P [r, a] ← N(0, 1)/√r, r = min(rank, a)
    matrices          R = X Pᵀ,   M ← β₁ M + (1 − β₁) R,   V ← β₂ V + (1 − β₂) R²,   N = M/(√V + ε)
                      S_i = φ_i X_i,   φ_i = ‖N_i‖/(‖R_i‖ + 1e-8)
                      l = max(‖S‖/(s + 1e-8), γ)/γ, 1 at first;   S ← S/l,   s ← ‖S‖
                      W ← (1 − η λ) W − η √scale √(1 − β₂ᵗ)/(1 − β₁ᵗ) S
    others            W ← (1 − η λ) W − η Adam(G), ε beside the uncorrected root

M, V and s are kept when P changes. The subspace only serves to measure: nothing is projected back, and no
decomposition is needed. State is 4 r (2b + a) + 4 bytes for a float32 matrix, where Adam has 8 a b.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from ..catalog import Card
from ..options import Options, option
from .chain import Chain, ChainOptimizer, partition
from .clipping import GrowthLimit
from .low_rank import AdamScaling, low_rank_rules, scaled
from .moments import Adam
from .roles import Params, Role
from .subspace import Subspace

CARD = Card(
    id="apollo",
    kind="optimizer",
    summary="The raw gradient with each channel scaled as Adam in a random subspace would: no SVD, little state.",
    paper="APOLLO: SGD-like Memory, AdamW-level Performance",
    year=2024,
    repository="zhuhanqing/APOLLO",
    equation="R = G Pᵀ, P random; W_i ← W_i − η √scale G_i ‖Adam(R)_i‖/‖R_i‖, growth of the norm limited to 1.01",
    acts_on="matrix",
    state_bytes={
        "matrix": "4 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols)) + 4",
        "adapter": "4 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols)) + 4",
        "any": "8 * n",
    },
    traffic_bytes={
        "matrix": "16 * n + 4 * min(rank, rows, cols) * (4 * max(rows, cols) + min(rows, cols)) + 8",
        "adapter": "16 * n + 4 * min(rank, rows, cols) * (4 * max(rows, cols) + min(rows, cols)) + 8",
        "any": "28 * n",
    },
    workspace_bytes={
        "matrix": "max(16 * rank * max(rows, cols), 4 * n * (cols > rows) + 8 * rank * max(rows, cols))",
        "adapter": "max(16 * rank * max(rows, cols), 4 * n * (cols > rows) + 8 * rank * max(rows, cols))",
        "any": "0",
    },
    flops="2 a b r for each matrix, a and b its short and long side",
    claim="Llama on C4: AdamW's perplexity or better with nearly the memory of SGD; three times its throughput on "
    "eight cards of 80 GB, from larger batches",
    checked=(
        "the equation in float64, finds spread and not; released code over fifty steps on the same random "
        "basis; every row of the update a multiple of the gradient's; its norm grows by 1.01 at most; state "
        "bytes; effect at 10 M parameters, 64 steps at rank 64 with new bases every 20, rate tuned alike, "
        "three seeds: validation loss 6.664 ± 0.030 where adamw has 6.775 ± 0.040, difference −0.11 [−0.49, "
        "+0.27] (studies/optimizers-early/report.json). One update of a 58 M Llama on two CPU cores: 2.57 ± 7"
        " % of torch's fused AdamW, 2.30 of its matrix products, 0.37 of apollo_torch's APOLLOAdamW (python "
        "benchmarks/optimizer_step.py low-rank --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_low_rank.json"),
    departures="scale_front of the released code is left out: the limit looks at ratios of norms, so that the root of "
    "scale before it or after it is the same but for the 1e-8. The basis is drawn in float32 from seed, update and "
    "name, and kept; by default the matrices draw at different updates. After a gradient of zeros the limit begins "
    "anew, where the released code would hold the norm near 1e-8 (as the first of a LoRA factor is). Weight decay "
    "before the update, none on vectors; embedding, head and vectors have Adam at the same rate, as released; more "
    "than two dimensions are seen as (first, all others); adapters are treated as matrices",
    tags=("memory", "low-rank", "random projection", "adam", "limiter", "full-rank"),
)


@dataclass(frozen=True)
class Config(Options):
    """APOLLO's hyper-parameters."""

    lr: float = option(0.01, "peak learning rate η", gt=0, source="released scripts")
    rank: int = option(
        128,
        "r, at most the short side",
        ge=1,
        source="released script, 60M, a quarter of hidden size; 256 at 1B and 7B",
    )
    refresh_every: int = option(200, "T, updates between two bases of a matrix", ge=1, source="released scripts")
    scale: float = option(1.0, "its root multiplies the update", gt=0, source="released scripts")
    growth: float = option(1.01, "γ, most growth of ‖S‖ in one update", ge=1, source="released code, after Fira")
    spread: bool = option(
        True, "each matrix draws its basis at updates of its own", source="ours, so that no update takes much longer"
    )
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's β₁ and β₂", ge=0, lt=1, source="released code")
    eps: float = option(1e-6, "Adam's ε", gt=0, source="released code")
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="released code")


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role."""
    adam = Adam(config.betas, config.eps)
    subspace = Subspace(config.rank, config.refresh_every, "gaussian", spread=config.spread)
    matrix = scaled(AdamScaling(subspace, adam, "row"), GrowthLimit(config.growth), sqrt(config.scale))
    return low_rank_rules(matrix, adam)


def build(config: Config, params: Params, *, seed: int = 0) -> ChainOptimizer:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run, on which the random bases depend.

    Raises:
        InputError: parameters without names.
    """
    return partition(rules(config))(params, lr=config.lr, weight_decay=config.weight_decay, seed=seed)
