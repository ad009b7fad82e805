"""AdamW with moments in 8 bits: a fourth of the state, for blocks of neighbours that share a scale.

    W ← (1 − η λ) W
    M ← β₁ M̂ + (1 − β₁) G,   V ← β₂ V̂ + (1 − β₂) G²
    W ← W − η · (M/(1 − β₁ᵗ)) / (√(V/(1 − β₂ᵗ)) + ε)
    M̂, V̂ = M, V rounded to 8 bits: c[code] · s, with s of each block of 256 in a row

The update uses the moments before they are rounded. The 256 numbers c are the dynamic codebook, over seven decades,
with either sign for M and without sign for V, which is not rounded to zero: `fallline.kernels.eight_bit`. Moments of
embeddings, of vectors, and of tensors of fewer than 4096 elements stay float32. To have other moments in 8 bits, see
`fallline.optim.eight_bit`.

State is 2 bytes and 1/32 per float32 parameter where AdamW has 8. In one visit it moves 16 where AdamW moves 28.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..catalog import Card
from ..kernels.eight_bit import BLOCK
from ..kernels.eight_bit_adam import Leaf, eight_bit_adam_step
from ..options import Options, option
from .chain import Chain, ChainOptimizer, chain, partition
from .eight_bit import SMALLEST, EightBit
from .moments import Adam
from .roles import Params, Role
from .transform import Members

CARD = Card(
    id="adamw-8bit",
    kind="optimizer",
    summary="AdamW with moments in 8 bits.",
    paper="8-bit Optimizers via Block-wise Quantization",
    year=2021,
    repository="bitsandbytes-foundation/bitsandbytes",
    equation="M, V of each block of 256 kept as c[code] · s; W ← (1 − ηλ)W − η M̂/(√V̂ + ε) with both before rounding",
    acts_on="row",
    state_bytes={
        "embedding": "8 * n",
        "vector": "8 * n",
        "objective": "8 * n",
        "any": "(min_8bit_size > n) * 8 * n + (n > min_8bit_size - 1) * "
        "(2 * n + 8 * rows * ((cols + block_size - 1) // block_size))",
    },
    traffic_bytes={
        "embedding": "28 * n",
        "vector": "28 * n",
        "objective": "28 * n",
        "any": "(min_8bit_size > n) * 28 * n + (n > min_8bit_size - 1) * "
        "(16 * n + 16 * rows * ((cols + block_size - 1) // block_size))",
    },
    claim="32-bit quality with a fourth of the state, hyper-parameters unchanged: language models of 1.5 billion "
    "parameters, RoBERTa, GLUE, translation, ImageNet",
    checked=(
        "the equation in float64, rounding by brute force; every code the nearest around every boundary; "
        "torchao's codes but for what departs; fifty updates within 1.5 % of float32 AdamW, and within 2 % of"
        " torchao's and of bitsandbytes'; a tiny language model of width 128 within 1 % of float32 AdamW's "
        "loss at every step; state bytes; effect at 10 M parameters, 64 steps, rate tuned alike, three seeds:"
        " validation loss 6.766 ± 0.037 where adamw has 6.775 ± 0.040, difference −0.01 [−0.14, +0.12] "
        "(studies/optimizers-early/report.json). One update of a 58 M Llama on two CPU cores: 2.34 ± 24 % of "
        "torch's fused AdamW, 0.07 of torchao.optim.AdamW8bit, 0.09 of bitsandbytes.optim.AdamW8bit (python "
        "benchmarks/optimizer_step.py eight-bit --pairs 15)"
    ),
    evidence=("studies/optimizers-early/report.json", "benchmarks/results/optimizer_step_eight_bit.json"),
    departures="the scale of a block has the sign of its largest element: the codebook has 1 but not −1, and in both "
    "released codes the largest shrinks by 0.7 % at every update where it is negative, so that a steady M settles 6 % "
    "too small. V is never rounded to zero unless it is zero: in torchao it is, below 1.6e-7 of its block's largest, "
    "and where M is not, the step then grows to 1/√(1 − β₂) times what it should be, or to M/ε when a gradient is "
    "zero. With dense gradients that is rare after the first updates; where features of the input differ a "
    "thousandfold, fifty updates of torchao's end more than 30 % away from AdamW's. bitsandbytes on a CPU rounds up "
    "what is below 1e-5 of the largest. A scale may be smaller than 1e-12, torchao's least. Blocks do not go on from "
    "row to row, which is the same where 256 divides the columns, so that a matrix may be sharded by rows; the last of "
    "a row may be short, where torchao leaves a tensor alone that it does not divide. Embeddings and vectors stay "
    "float32, as bitsandbytes recommends for embeddings but does only when told; a tied table is a head, and rounded. "
    "A NaN spoils the moments of its block. No weight decay on norms and biases. No stochastic rounding of bfloat16 "
    "weights",
    tags=("adam", "memory", "8 bit", "quantisation", "low precision"),
)


@dataclass(frozen=True)
class Config(Options):
    """Adam's hyper-parameters, and what is rounded."""

    lr: float = option(1e-3, "peak learning rate η", gt=0, source="released code")
    betas: tuple[float, float] = option((0.9, 0.999), "β₁ and β₂", ge=0, lt=1, source="released code")
    eps: float = option(1e-8, "added to the root, ε", gt=0, source="released code")
    weight_decay: float = option(0.01, "λ, on matrices, embeddings and head", ge=0, source="released code")
    block_size: int = option(
        BLOCK, "elements that share a scale", ge=1, source="released code; 2048 in the paper and older code"
    )
    min_8bit_size: int = option(
        SMALLEST, "elements below which a tensor's moments stay float32", ge=1, source="released code"
    )


def rules(config: Config) -> dict[Role, Chain]:
    """The method: a chain for each role."""
    adam = Adam(config.betas, config.eps, corrected=True)
    eight_bit = EightBit(adam, config.block_size, config.min_8bit_size)

    def fused(members: Members, lr: float | Tensor, decay: float) -> None:
        small = [(ctx, {"adam": s["eightbit"]}) for ctx, s in members if isinstance(s["eightbit"]["exp_avg"], Tensor)]
        adam.fused(small, lr, decay)
        for step in sorted({ctx.step for ctx, _ in members}):
            leaves = [
                Leaf(ctx.param, ctx.grad, M["codes"], M["scales"], V["codes"], V["scales"])
                for ctx, s in members
                for M, V in [(s["eightbit"]["exp_avg"], s["eightbit"]["exp_avg_sq"])]
                if ctx.step == step and not isinstance(M, Tensor)
            ]
            eight_bit_adam_step(
                leaves, betas=config.betas, eps=config.eps, t=step + 1, lr=lr, decay=decay, block=config.block_size
            )

    exact = chain(adam, fused=adam.fused)
    rounded = chain(eight_bit, fused=fused)
    return {
        "matrix": rounded,
        "embedding": exact,
        "head": rounded,
        "vector": exact,
        "adapter": rounded,
        "objective": exact,
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
    return partition(rules(config))(params, lr=config.lr, weight_decay=config.weight_decay, seed=seed)
