"""SinkGD: descent along the gradient with all rows and all columns at unit size, found by Sinkhorn's iteration.

With G [m, n] in PyTorch's layout, learning rate η, matrices' ratio c, weight decay λ, L iterations and X = G before:

    matrices     L times:   X_i ← √n X_i/‖X_i‖ for each row i,   X_j ← √m X_j/‖X_j‖ for each column j
                 W ← (1 − η λ) W − η c X
    others       W ← (1 − η λ) W − η · Adam(G), ε beside the corrected root

The learning rate is Adam's, and matrices follow it by c, as is published; decay goes by η alone. Afterwards columns
have unit root mean square, rows nearly, and X = diag(u) G diag(v) has the signs of G. Norms are kept above 1e-8, so
that zero stays zero: `fallline.optim.normalise.Sinkhorn`.

Matrices have no state. The form of u and v reads the squares of G 2 L times, each from the cache where a matrix fits in
it; the card's traffic, 4 (L + 3) bytes, is that of a matrix which does not, with both halves of a step in one visit.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..catalog import Card
from ..kernels.sinkhorn import sinkhorn_step
from ..options import Options, option
from .chain import Chain, ChainOptimizer, chain, partition
from .matrices import beside_adam
from .normalise import SMALLEST, Sinkhorn, Times
from .roles import Params, Role
from .transform import Members

CARD = Card(
    id="sinkgd",
    kind="optimizer",
    summary="Gradient with rows and columns of unit size, no state for hidden matrices; Adam for the rest.",
    paper="Gradient Multi-Normalization for Stateless and Scalable LLM Training",
    year=2025,
    equation="L times: X_i ← √n X_i/‖X_i‖, X_j ← √m X_j/‖X_j‖, from X = G; W ← (1 − ηλ)W − η c X",
    acts_on="matrix",
    state_bytes={"matrix": "0", "adapter": "0", "any": "8 * n"},
    traffic_bytes={
        "matrix": "4 * (iterations + 3) * n",
        "adapter": "4 * (iterations + 3) * n",
        "any": "28 * n",
    },
    workspace_bytes={"matrix": "4 * n", "adapter": "4 * n", "any": "0"},
    flops="4 · iterations · n for each matrix of n elements",
    claim="Llama up to 1.3B on C4: Adam's perplexity with 40 % of the tokens, at the memory of plain descent",
    checked=(
        "the equation in float64; unit columns and rows; the same X whatever scales rows and columns of G "
        "have; signs of G; float32 on millions of elements; state bytes; effect at 10 M parameters, 64 steps,"
        " rate tuned alike, three seeds: validation loss 6.7524 ± 0.0060 where adamw has 6.775 ± 0.040, "
        "difference −0.02 [−0.43, +0.38] (studies/optimizers-early/report.json). One update of a 58 M Llama "
        "on two CPU cores: 1.77 ± 13 % of torch's fused AdamW (python benchmarks/optimizer_step.py normalised"
        " --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_normalised.json"),
    departures="the authors released no code; iterations, ratio and Adam's numbers are those on which independent "
    "ports agree. One port divides X by √(mn), which the paper does not; a port lets decay go by η c, we by η; more "
    "than two dimensions are seen as (first, all others), where a port takes the first for experts; adapters are "
    "treated as matrices; a tied table has Adam; no weight decay on vectors",
    tags=("memory", "stateless", "normalisation", "sinkhorn"),
)


@dataclass(frozen=True)
class Config(Options):
    """SinkGD's hyper-parameters."""

    lr: float = option(0.02, "peak learning rate η, Adam's", gt=0, source="independent ports, as the paper's for Llama")
    matrix_lr_ratio: float = option(
        0.05, "c, step of matrices in units of lr", gt=0, source="independent ports, as the paper's for Llama"
    )
    iterations: int = option(5, "L, of rows and columns", ge=1, source="paper; independent ports")
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="independent ports")
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's β₁ and β₂", ge=0, lt=1, source="independent ports")
    eps: float = option(1e-8, "Adam's ε", gt=0, source="independent ports")


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role."""

    def fused(members: Members, lr: float | Tensor, decay: float) -> None:
        rate, keep = lr * config.matrix_lr_ratio, 1 - lr * decay if decay else None
        for ctx, _ in members:
            sinkhorn_step(ctx.param, ctx.grad, config.iterations, rate, keep, SMALLEST)

    matrix = chain(Sinkhorn(config.iterations), Times(config.matrix_lr_ratio), fused=fused)
    return beside_adam(matrix, config.betas, config.eps)


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
