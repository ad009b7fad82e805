"""SWAN: the gradient standardised, then whitened, at the norm it had between the two.

With G [m, n] in PyTorch's layout (m output units), learning rate η, matrices' ratio c and weight decay λ:

    matrices     X_i = (G_i − mean_j G_ij) / std_j G_ij      each row, where m > n each column; population deviation
                 Δ = (X Xᵀ)^(−1/2) X = polar(X),   Δ ← Δ ‖X‖/‖Δ‖
                 W ← (1 − η λ) W − η c Δ
    others       W ← (1 − η λ) W − η · Adam(G), ε beside the corrected root

where polar(X), the U Vᵀ of a singular value decomposition, is `ns_steps` iterations of Polar Express: eight are exact
where singular values are at least 0.001 ‖X‖. Both act along the longer side, on the short one. Rows of X add up to
zero, so that for m = n one singular value of X is zero; it stays zero. The learning rate is Adam's, and matrices follow
it by c.

Matrices have no state. One of short side a and long side b costs ns_steps (4 a² b + 2 a³) operations an update.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..catalog import Card
from ..options import Options, option
from .chain import Chain, ChainOptimizer, partition
from .matrices import batched, beside_adam
from .normalise import Standardise, Times
from .orthogonalise import Orthogonalise
from .roles import Params, Role

CARD = Card(
    id="swan",
    kind="optimizer",
    summary="Gradient standardised along the longer side, whitened: no state for hidden matrices; Adam for the rest.",
    paper="SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training",
    year=2024,
    equation="X_i = (G_i − mean G_i)/std G_i; Δ = (XXᵀ)^(−1/2) X; W ← (1 − ηλ)W − η c Δ ‖X‖/‖Δ‖",
    acts_on="matrix",
    state_bytes={"matrix": "0", "adapter": "0", "any": "8 * n"},
    traffic_bytes={"matrix": "12 * n", "adapter": "12 * n", "any": "28 * n"},
    workspace_bytes={"matrix": "24 * max(n, 1048576)", "adapter": "24 * max(n, 1048576)", "any": "0"},
    flops="ns_steps · (4a²b + 2a³) for each matrix, a and b its short and long side; ns_steps · 8a³ and 4a²b for every "
    "three of them on a CPU where b ≥ 1.5a",
    claim="Llama 350M and 1.3B: Adam's perplexity with half the tokens, at the memory of plain descent",
    checked=(
        "the equation in float64; the polar factor of a singular value decomposition; means 0 and deviations "
        "1; the direction that means leave empty in a square matrix stays empty; the same Δ whatever scales "
        "and means rows of G have; state bytes; effect at 10 M parameters, 64 steps, rate tuned alike, three "
        "seeds: validation loss 6.264 ± 0.041 where adamw has 6.775 ± 0.040, difference −0.51 [−0.74, −0.29] "
        "(studies/optimizers-early/report.json). The matrices of a 58 M Llama on two CPU cores: 0.89 of its "
        "matrix products, 208 times torch's fused AdamW (python benchmarks/optimizer_step.py orthogonal "
        "--pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_orthogonal.json"),
    departures="the authors released no code. Whitening is the polar factor by Polar Express, where the paper has a "
    "coupled Newton–Schulz iteration for the inverse root, whose settings in ports leave singular values between 0.56 "
    "and 1.6 (β = 0.8, 10 steps) or small ones far from 1 (β = 1/2, 6 steps); the ratio c and its value are those of "
    "ports and of the same authors' SinkGD; a row that is constant along the longer side has no "
    "update; more than two dimensions are seen as (first, all others); adapters are treated as "
    "matrices; a tied table has Adam; no weight decay on vectors",
    tags=("memory", "stateless", "normalisation", "whitening", "orthogonalisation", "spectral"),
)


@dataclass(frozen=True)
class Config(Options):
    """SWAN's hyper-parameters."""

    lr: float = option(0.02, "peak learning rate η, Adam's", gt=0, source="independent ports, as for SinkGD")
    matrix_lr_ratio: float = option(
        0.05, "c, step of matrices in units of lr", gt=0, source="an independent port; SinkGD's"
    )
    ns_steps: int = option(
        8, "iterations of whitening; time is in proportion", ge=1, source="our choice: exact, see fallline.polar"
    )
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="our choice: as SinkGD")
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's β₁ and β₂", ge=0, lt=1, source="our choice: as SinkGD")
    eps: float = option(1e-8, "Adam's ε", gt=0, source="our choice: as SinkGD")


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role."""
    whiten = Orthogonalise("polar-express", config.ns_steps, "keep-norm")
    return beside_adam(batched(Standardise(), whiten, Times(config.matrix_lr_ratio)), config.betas, config.eps)


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
