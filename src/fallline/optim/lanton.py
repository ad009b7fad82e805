"""LANTON: steps of one size in a norm for each kind of layer, smaller where a layer's gradient is noisier than others'.

With gradient G, learning rate η, weight decay λ and momentum β₁, for every layer:

    B ← β₁ B + (1 − β₁) G,   B = 0 before
    hidden matrices        O = 0.2 √max(m, n) polar(B)        ‖D‖ = √(m/n) · nuclear norm of D [m, n]
    embedding and head     O = 0.2 sign(B)                    ‖D‖ = Σ |D|
    vectors of n elements  O = 0.2 √n B/‖B‖₂                  ‖D‖ = √n ‖D‖₂

    H ← β₂ H + (1 − β₂) ‖G − G'‖²,   H = 0 before, G' the gradient before; not at the first update
    a = α/√(α² + H),   η' = η √(a/max a), the maximum over the layers of the same kind
    W ← (1 − η' λ) W − η' O

polar(B), nearly the U Vᵀ of a singular value decomposition, is `ns_steps` iterations of Polar Express, for which see
`fallline.polar`; the nuclear norm is ⟨D, polar(D)⟩. The least noisy layer of a kind has η itself. The root mean square
of O is near 0.2, as AdamW's updates have it.

State is an average, the last gradient and one number: 8 bytes per float32 parameter. A hidden matrix of short side a
and long side b costs 2 ns_steps (4 a² b + 2 a³) operations an update, twice Muon's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..catalog import Card
from ..options import Options, option
from .chain import Chain, ChainOptimizer, chain, partition
from .layerwise import Decay, LayerRate, absolute_sum, nuclear, scaled_norm
from .moments import Ema
from .normalise import Sign, Times, UnitSize
from .orthogonalise import Orthogonalise
from .roles import Params, Role

CARD = Card(
    id="lanton",
    kind="optimizer",
    summary="Muon's step for matrices, sign for tables; a layer noisier than others of its kind has a smaller rate.",
    paper="Noise-Adaptive Layerwise Learning Rates: Accelerating Geometry-Aware Optimization for Deep Neural Network "
    "Training",
    year=2025,
    equation="H ← β₂H + (1 − β₂)‖G − G'‖²; a = α/√(α² + H); W ← W − η √(a/max a) O, O = polar(B), sign(B) or B/‖B‖",
    acts_on="group",
    state_bytes={"any": "8 * n + 4"},
    traffic_bytes={"any": "28 * n + 8"},
    workspace_bytes={"matrix": "20 * n", "adapter": "20 * n", "any": "4 * n"},
    flops="2 · ns_steps · (4a²b + 2a³) for each hidden matrix, a and b its short and long side",
    claim="Llama 1.1B on C4: D-Muon's loss with two thirds of the tokens",
    checked="the equation in float64; base steps where α is large or all layers are equally noisy; the least noisy "
    "layer of a kind has the full rate, and the rate falls with noise; bounds of the nuclear norm; state "
    "bytes; effect not shown. The matrices of a 58 M Llama on two CPU cores: 0.88 of its matrix products, "
    "257 times torch's fused AdamW (python benchmarks/optimizer_step.py orthogonal --pairs 15)",
    evidence=("benchmarks/results/optimizer_step_orthogonal.json",),
    departures="the authors released no code, and the paper's text was not found. Confirmed by reviews and digests of "
    "it: the kinds of step for matrices and tables, the momentum, an average of the squared difference of successive "
    "gradients in the dual norm, and that noise lowers the rate. Our reading, not confirmed: the formula of a, the "
    "maximum over layers of a kind, the square root, that decay goes by η', the step of vectors, and every constant; "
    "so α and β₂ have no default. The size 0.2 is ours, for AdamW's rates to fit. Adapters are treated as matrices, an "
    "objective's own parameters as vectors; a tied table is a head; a layer that grows counts its new elements as "
    "noise once; no weight decay on vectors",
    tags=("momentum", "orthogonalisation", "spectral", "sign", "noise", "layerwise", "adaptive"),
)

SIZE = 0.2
"""Root mean square of a step, in units of its learning rate."""


@dataclass(frozen=True)
class Config(Options):
    """LANTON's hyper-parameters."""

    alpha: float = option(
        help="α, the noise at which a layer's share falls to 0.71; in units of a gradient's dual norm", gt=0
    )
    noise_momentum: float = option(help="β₂, of the average noise; close to 1", ge=0, lt=1)
    lr: float = option(1e-3, "peak learning rate η", gt=0, source="our choice: AdamW's, as steps have its size")
    momentum: float = option(0.95, "β₁", ge=0, lt=1, source="our choice: Muon's")
    ns_steps: int = option(5, "iterations for polar factors", ge=1, source="our choice: Muon's")
    weight_decay: float = option(0.0, "λ, on matrices, embedding and head", ge=0, source="our choice")


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role; a kind of layer is a chain."""
    average, decay = Ema(config.momentum), Decay(config.weight_decay)
    orthogonalise = Orthogonalise("polar-express", config.ns_steps, "match-rms")
    noise = config.alpha, config.noise_momentum
    matrix = chain(average, orthogonalise, decay, LayerRate(*noise, nuclear("polar-express", config.ns_steps)))
    table = chain(average, Sign(), Times(SIZE), decay, LayerRate(*noise, absolute_sum))
    vector = chain(average, UnitSize(), Times(SIZE), LayerRate(*noise, scaled_norm))
    return {
        "matrix": matrix,
        "embedding": table,
        "head": table,
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
    return partition(rules(config))(params, lr=config.lr, seed=seed)
