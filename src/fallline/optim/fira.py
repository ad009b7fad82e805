"""Fira: GaLore, and the rest of the gradient beside its subspace by as much as Adam scales what is inside.

With G [m, n], seen as X [b, a] with its long side first, learning rate η, weight decay λ and t from 1:

    every T updates   P [r, a] ← leading right singular vectors of X, r = min(rank, a)
    matrices          R = X Pᵀ,   M ← β₁ M + (1 − β₁) R,   V ← β₂ V + (1 − β₂) R²,   N = M/(√V + ε)
                      S_i = φ_i (X − α R P)_i,   φ_i = ‖N_i‖/(‖R_i‖ + 1e-8)
                      l = max(‖S‖/(s + 1e-8), γ)/γ, 1 at first;   S ← S/l,   s ← ‖S‖
                      W ← (1 − η λ) W − η √(1 − β₂ᵗ)/(1 − β₁ᵗ) (α N P + S)
    others            W ← (1 − η λ) W − η Adam(G), ε beside the uncorrected root

M, V and s are kept when P changes. By default P is not decomposed anew but follows the gradient by one step of block
power iteration, and each matrix at updates of its own: `fallline.optim.subspace`.

State is that of GaLore and one number. For κ < ½ S is never formed, as its norm follows from the norms of rows of X and
R; above, where that would cost digits, X − κ R P is, by a third product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..catalog import Card
from ..options import Options, option
from .chain import Chain, ChainOptimizer, chain, partition
from .clipping import GrowthLimit
from .low_rank import LowRankAdamWithRest, low_rank_rules
from .moments import Adam
from .roles import Params, Role
from .subspace import Subspace

CARD = Card(
    id="fira",
    kind="optimizer",
    summary="GaLore plus the gradient beside its subspace, scaled as Adam scales inside: full-rank updates.",
    paper="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    year=2024,
    repository="xichen-fy/Fira",
    equation="W ← W − η (α N P + S), S_i = (G − α R P)_i ‖N_i‖/‖R_i‖ with ‖S‖ at most 1.01 of what it was",
    acts_on="matrix",
    state_bytes={
        "matrix": "4 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols)) + 4",
        "adapter": "4 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols)) + 4",
        "any": "8 * n",
    },
    traffic_bytes={
        "matrix": "16 * n + 8 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols)) + 8",
        "adapter": "16 * n + 8 * min(rank, rows, cols) * (2 * max(rows, cols) + min(rows, cols)) + 8",
        "any": "28 * n",
    },
    workspace_bytes={
        "matrix": "8 * n + 8 * n * (basis == 'svd') + 12 * min(rank, rows, cols) * max(rows, cols)",
        "adapter": "8 * n + 8 * n * (basis == 'svd') + 12 * min(rank, rows, cols) * max(rows, cols)",
        "any": "0",
    },
    flops="4 a b r for each matrix, 6 a b r with κ ≥ ½, a and b its short and long side, and 4 a b r + O(a r²) more at "
    "one of refresh_every updates; with basis svd, then a singular value decomposition",
    claim="Llama 60M to 1B on C4: Adam's perplexity or better, 61.1 % less optimizer state at 1B",
    checked=(
        "the equation in float64 with both bases, finds spread and not; released code over fifty steps with "
        "basis svd and without spread; for κ < ½ the norm without S is that of S; it grows by 1.01 at most; "
        "state bytes; effect at 10 M parameters, 64 steps at rank 64 with new bases every 20, rate tuned "
        "alike, three seeds: validation loss 6.639 ± 0.013 where adamw has 6.775 ± 0.040, difference −0.14 "
        "[−0.53, +0.25] (studies/optimizers-early/report.json). One update of a 58 M Llama on two CPU cores: "
        "3.91 ± 15 % of torch's fused AdamW, 1.69 of its matrix products, 0.43 of fira's FiraAdamW (python "
        "benchmarks/optimizer_step.py low-rank --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_low_rank.json"),
    departures="the released code subtracts α R P from the gradient, the text R P: residual_alpha chooses. By default "
    "the basis takes one step of power iteration with the current gradient where the released code decomposes it, and "
    "the matrices do so at different updates: basis svd without spread is the released code. After a gradient of "
    "zeros the limit begins anew, where the released code would hold the norm near 1e-8 (as the first of a LoRA "
    "factor is); ‖S‖ counts as 1e-7 ‖φ∘G‖ at least, which is rounding. Signs of singular vectors are fixed. The basis "
    "is float32 where the released code has that of the gradient. Weight decay before the update, none on vectors; "
    "embedding, head and vectors have Adam at the same rate, as released; more than two dimensions are seen as "
    "(first, all others); adapters are treated as matrices",
    tags=("memory", "low-rank", "projection", "adam", "svd", "residual", "full-rank", "limiter"),
)


@dataclass(frozen=True)
class Config(Options):
    """Fira's hyper-parameters."""

    lr: float = option(0.01, "peak learning rate η", gt=0, source="released scripts, pre-training; 1e-4 fine-tuning")
    rank: int = option(128, "r, at most the short side", ge=1, source="paper, 60M; 512 at 1B; 32 for fine-tuning of 7B")
    refresh_every: int = option(200, "T, updates between two bases of a matrix", ge=1, source="released scripts")
    alpha: float = option(0.25, "α, of what is inside the subspace", gt=0, source="released script, 60M; 0.0625 at 1B")
    growth: float = option(1.01, "γ, most growth of ‖S‖ in one update", ge=1, source="paper; released code")
    residual_alpha: bool = option(True, "S leaves out α R P, not R P", source="released code; false: paper")
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
    kappa = config.alpha if config.residual_alpha else 1.0
    both = LowRankAdamWithRest(subspace, adam, config.alpha, kappa, GrowthLimit(config.growth))
    return low_rank_rules(chain(both, fused=both.fused), adam)


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
