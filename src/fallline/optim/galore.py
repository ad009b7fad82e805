"""GaLore: Adam in a subspace of each matrix's gradient, found anew now and then.

With G [m, n], seen as X [b, a] with its long side first, learning rate η, weight decay λ and t from 1:

    every T updates   P [r, a] ← leading right singular vectors of X, r = min(rank, a)
    matrices          R = X Pᵀ,   M ← β₁ M + (1 − β₁) R,   V ← β₂ V + (1 − β₂) R²,   N = M/(√V + ε)
                      W ← (1 − η λ) W − η α √(1 − β₂ᵗ)/(1 − β₁ᵗ) N P
    others            W ← (1 − η λ) W − η Adam(G), ε beside the uncorrected root

M and V are kept when P changes. By default P is not decomposed anew but follows the gradient by one step of block power
iteration, and each matrix at updates of its own: `fallline.optim.subspace`.

State is 4 r (2b + a) bytes for a float32 matrix, where Adam has 8 a b. An update costs two products of 2 a b r
operations each, and at one of T updates two more and a QR of [a, r].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..catalog import Card
from ..options import Options, option
from .chain import Chain, ChainOptimizer, chain, partition
from .low_rank import LowRankAdam, low_rank_rules
from .moments import Adam
from .roles import Params, Role
from .subspace import Subspace

CARD = Card(
    id="galore",
    kind="optimizer",
    summary="Adam in a low-rank subspace of each matrix's gradient: the state of r of a directions only.",
    paper="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    year=2024,
    repository="jiaweizzhao/GaLore",
    equation="R = G Pᵀ, P the leading r right singular vectors of G every T updates; W ← W − η α Adam(R) P",
    acts_on="matrix",
    state_bytes={
        "matrix": "4 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols))",
        "adapter": "4 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols))",
        "any": "8 * n",
    },
    traffic_bytes={
        "matrix": "12 * n + 8 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols))",
        "adapter": "12 * n + 8 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols))",
        "any": "28 * n",
    },
    workspace_bytes={
        "matrix": "8 * n + 8 * n * (basis == 'svd') + 12 * min(rank, rows, cols) * max(rows, cols)",
        "adapter": "8 * n + 8 * n * (basis == 'svd') + 12 * min(rank, rows, cols) * max(rows, cols)",
        "any": "0",
    },
    flops="4 a b r for each matrix, a and b its short and long side, and 4 a b r + O(a r²) more at one of "
    "refresh_every updates; with basis svd, then a singular value decomposition",
    claim="Llama 60M to 1B on C4: near Adam's perplexity with up to 65.5 % less optimizer state in bfloat16; Llama 7B "
    "on a card of 24 GB",
    checked=(
        "the equation in float64 with both bases, finds spread and not; released code over fifty steps with "
        "basis svd and without spread; updates of rank r within the basis; state bytes; effect at 10 M "
        "parameters, 64 steps at rank 64 with new bases every 20, rate tuned alike, three seeds: validation "
        "loss 6.553 ± 0.017 where adamw has 6.775 ± 0.040, difference −0.22 [−0.84, +0.40] "
        "(studies/optimizers-early/report.json). One update of a 58 M Llama on two CPU cores: 3.13 ± 13 % of "
        "torch's fused AdamW, 1.40 of its matrix products, 0.38 of galore_torch's GaLoreAdamW (python "
        "benchmarks/optimizer_step.py low-rank --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_low_rank.json"),
    departures="by default the basis takes one step of power iteration with the current gradient where the released "
    "code decomposes it, and the matrices do so at different updates: basis svd without spread is the released code. "
    "Signs of singular vectors are fixed. The basis is float32 where the released code has that of the gradient. "
    "Weight decay before the update, none on vectors; embedding, head and vectors have Adam at the same rate, as "
    "released; more than two dimensions are seen as (first, all others); adapters are treated as matrices",
    tags=("memory", "low-rank", "projection", "adam", "svd"),
)


@dataclass(frozen=True)
class Config(Options):
    """GaLore's hyper-parameters."""

    lr: float = option(0.01, "peak learning rate η", gt=0, source="released scripts, 60M to 1B; 0.005 at 7B")
    rank: int = option(
        128, "r, at most the short side", ge=1, source="paper, 60M; 256 at 130M and 350M, 512 at 1B, 1024 at 7B"
    )
    refresh_every: int = option(
        200, "T, updates between two bases of a matrix", ge=1, source="released scripts; 500 at 7B"
    )
    alpha: float = option(0.25, "α, learning rate of matrices in units of lr", gt=0, source="released scripts")
    basis: Literal["iteration", "svd"] = option(
        "iteration",
        "how it is found: iteration follows the gradient, svd is exact and slow",
        source="svd: released code; iteration: ours, at least ten times faster",
    )
    spread: bool = option(
        True, "each matrix finds its basis at updates of its own", source="ours, so that no update takes much longer"
    )
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's β₁ and β₂", ge=0, lt=1, source="released code")
    eps: float = option(1e-6, "Adam's ε", gt=0, source="released code")
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="released code")


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role."""
    adam = Adam(config.betas, config.eps)
    subspace = Subspace(config.rank, config.refresh_every, config.basis, spread=config.spread)
    inside = LowRankAdam(subspace, adam, config.alpha)
    return low_rank_rules(chain(inside, fused=inside.fused), adam)


def build(config: Config, params: Params, *, seed: int = 0) -> ChainOptimizer:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run; the first basis of an iteration begins with random numbers.

    Raises:
        InputError: parameters without names.
    """
    return partition(rules(config))(params, lr=config.lr, weight_decay=config.weight_decay, seed=seed)
