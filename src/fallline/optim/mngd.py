"""Multi-normalised descent: the gradient projected on the unit spheres of several norms in turn.

With G [m, n] in PyTorch's layout, learning rate η, matrices' ratio c, weight decay λ, norms g₁ … g_K and X = G before:

    matrices     L times, for each norm:   X ← P_g(X) = argmax ⟨X, Z⟩ over g(Z) ≤ 1
                 W ← (1 − η λ) W − η c X
    others       W ← (1 − η λ) W − η · Adam(G), ε beside the corrected root

    row        X_i ← √n X_i/‖X_i‖        g(Z) = max_i ‖Z_i‖/√n
    column     X_j ← √m X_j/‖X_j‖        g(Z) = max_j ‖Z_j‖/√m
    spectral   X ← √max(m, n) polar(X)   g(Z) = ‖Z‖₂/√max(m, n)
    max        X ← sign(X)               g(Z) = max|Z_ij|

Each norm is scaled so that the root mean square of what is left of a matrix of full rank is 1. The learning rate is
Adam's, and matrices follow it by c. Rows and columns are SinkGD, which has a faster path for them; rows and spectral,
once, are SWAN without means for m ≤ n: that is a fixed point, as a matrix with equal singular values has equal rows.

Matrices have no state. polar(X) is eight iterations of Polar Express, for each L.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..catalog import Card
from ..errors import InputError
from ..options import Options, option
from .chain import Chain, ChainOptimizer, partition
from .matrices import batched, beside_adam
from .normalise import Sign, Times, UnitRms
from .orthogonalise import Orthogonalise
from .roles import Params, Role
from .transform import Transform

Norm = Literal["row", "column", "spectral", "max"]

CARD = Card(
    id="mngd",
    kind="optimizer",
    summary="Gradient on the unit spheres of several norms in turn, no state for hidden matrices; Adam for the rest.",
    paper="Gradient Multi-Normalization for Stateless and Scalable LLM Training",
    year=2025,
    equation="L times, for each norm g: X ← argmax ⟨X, Z⟩ over g(Z) ≤ 1, from X = G; W ← (1 − ηλ)W − η c X",
    acts_on="matrix",
    state_bytes={"matrix": "0", "adapter": "0", "any": "8 * n"},
    traffic_bytes={"matrix": "12 * n", "adapter": "12 * n", "any": "28 * n"},
    workspace_bytes={"matrix": "24 * max(n, 1048576)", "adapter": "24 * max(n, 1048576)", "any": "0"},
    flops="iterations · 8 · (4a²b + 2a³) for each matrix with the spectral norm, a and b its short and long side; "
    "8 · 8a³ and 3 · 4a²b an iteration on a CPU where b ≥ 1.5a",
    claim="none of its own: SWAN and SinkGD are two of its settings",
    checked=(
        "the equation in float64; ⟨G, X⟩ is the dual of each norm, which is 1 after its projection; rows and "
        "columns are SinkGD where their root mean square is well above 1e-8; rows and spectral, once, are "
        "SWAN on a gradient whose rows have mean zero; state bytes; effect at 10 M parameters, 64 steps, rate"
        " tuned alike, three seeds: validation loss 6.245 ± 0.038 where adamw has 6.775 ± 0.040, difference "
        "−0.53 [−0.83, −0.23] (studies/optimizers-early/report.json). The matrices of a 58 M Llama on two CPU"
        " cores: 0.90 of its matrix products, 212 times torch's fused AdamW (python "
        "benchmarks/optimizer_step.py orthogonal --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_orthogonal.json"),
    departures="the authors released no code; the ratio c and Adam's numbers are those of SinkGD's ports. The scales "
    "of the norms are our reading for spectral and max; one pass by default, where SinkGD has five; more than two "
    "dimensions are seen as (first, all others); adapters are treated as matrices; a tied table has Adam; no weight "
    "decay on vectors",
    tags=("memory", "stateless", "normalisation", "orthogonalisation", "spectral"),
)

EXACT = 8
"""Iterations of Polar Express after which singular values are 1 if they were at least 0.001 of the norm."""


@dataclass(frozen=True)
class Config(Options):
    """MNGD's hyper-parameters."""

    lr: float = option(0.02, "peak learning rate η, Adam's", gt=0, source="independent ports of SinkGD")
    matrix_lr_ratio: float = option(
        0.05, "c, step of matrices in units of lr", gt=0, source="independent ports of SinkGD"
    )
    norms: tuple[Norm, ...] = option(
        ("row", "spectral"), "the norms, in order: row, column, spectral, max", source="paper: SWAN's pair"
    )
    iterations: int = option(
        1,
        "L, over all norms",
        ge=1,
        source="our choice: for the default norms one is a fixed point if m ≤ n; 5 in SinkGD",
    )
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="independent ports of SinkGD")
    betas: tuple[float, float] = option(
        (0.9, 0.999), "Adam's β₁ and β₂", ge=0, lt=1, source="independent ports of SinkGD"
    )
    eps: float = option(1e-8, "Adam's ε", gt=0, source="independent ports of SinkGD")

    def check(self) -> None:
        if not self.norms:
            raise InputError("'norms' is empty; give at least one of row, column, spectral, max")


def projection(norm: Norm) -> Transform:
    """P_g of a norm."""
    match norm:
        case "spectral":
            return Orthogonalise("polar-express", EXACT, "unit-rms")
        case "max":
            return Sign()
    return UnitRms(norm)


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role."""
    projections = [projection(norm) for norm in config.norms] * config.iterations
    return beside_adam(batched(*projections, Times(config.matrix_lr_ratio)), config.betas, config.eps)


def build(config: Config, params: Params, *, seed: int = 0) -> ChainOptimizer:
    """The optimizer.

    Args:
        config: hyper-parameters.
        params: model, name → (parameter, role), or (name, parameter) pairs.
        seed: of the run; nothing here is random.

    Raises:
        InputError: parameters without names.
    """
    return partition(rules(config))(params, lr=config.lr, weight_decay=config.weight_decay, seed=seed)
