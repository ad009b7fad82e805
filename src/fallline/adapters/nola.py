"""NOLA: a LoRA whose A and B are sums of random matrices, of which only the coefficients are trained.

    A = A₀ + Σ a_i A⁽ⁱ⁾,   B = Σ b_i B⁽ⁱ⁾,   i = 1 … k;   entries of A⁽ⁱ⁾ [r, n] and B⁽ⁱ⁾ [m, r] ~ U(−1, 1)/√k
    y = x Wᵀ + b + s (x Aᵀ) Bᵀ,   A₀ and s as LoRA's,   a = b = 0 at the start
    ∂L/∂a_i = ⟨∂L/∂A, A⁽ⁱ⁾⟩,   ∂L/∂b_i = ⟨∂L/∂B, B⁽ⁱ⁾⟩

The random matrices are drawn anew, a block at a time, in every forward and backward, on the CPU and from generators of
their own, keyed by the run's seed, the layer and the block. What is trained does not grow with rank or width.

Cost: 2 k trained parameters for any weight [m, n]; LoRA's operations and, in every forward and every backward, k r (m +
n) random numbers with two operations each. So merge, or save and load, before generating text. A and B are kept for the
backward, the random matrices never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..catalog import Card
from ..noise import rng
from ..options import option
from . import lora
from .base import Weight
from .made_lora import MadeLora

CARD = Card(
    id="nola",
    kind="adapter",
    summary="A LoRA of sums of random matrices; only their coefficients are trained, as many for any weight.",
    paper="NOLA: Networks as Linear Combination of Low Rank Random Basis",
    year=2023,
    repository="UCDvision/NOLA",
    equation="A = A₀ + Σ a_i A⁽ⁱ⁾, B = Σ b_i B⁽ⁱ⁾ with seeded random A⁽ⁱ⁾, B⁽ⁱ⁾; y = x Wᵀ + b + s (x Aᵀ) Bᵀ",
    acts_on="matrix",
    flops="4 T n m + 6 T r (n + m) + 4 k r (n + m) for T tokens, with 2 k r (n + m) random numbers",
    claim="as good as LoRA of rank 1 with half of its parameters, on larger models",
    checked=(
        "value and derivatives to second order in float64; random matrices are never held together and leave the "
        "global generators alone; 2 k trained parameters; PEFT checkpoints with equal logits; effect not shown"
    ),
    departures=(
        "released code seeds the global generators in every forward; here each block has its own, on the CPU, so that "
        "every device has the same matrices. Per-example gradients are refused. a and b are vectors to our optimizers, "
        "so without weight decay, and by the rule and rate for vectors"
    ),
    tags=("peft", "low rank", "fine-tuning", "parameter-efficient", "random basis", "tiny"),
)

BLOCK = 1 << 20
"""Random numbers at a time, or those of one matrix. Another value makes other matrices."""


@dataclass(frozen=True, kw_only=True)
class Config(lora.Config):
    """Hyper-parameters of NOLA."""

    bases: int = option(128, "k, random matrices for each of A and B", gt=0, source="released code, its Llama script")


class Nola(MadeLora):
    """See the module docstring; `P` has `a` and `b` [k] and, frozen, `key` [8] and `frame` [m, n, 0]: a number in
    bytes, which every dtype holds exactly, and nothing but its shape."""

    id = "nola"
    config: Config

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        return {"a": (self.config.bases,), "b": (self.config.bases,)}

    def frozen(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        return {"key": (8,), "frame": (m, n, 0)}

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        key: Any = P.key
        key.copy_(torch.randint(0, 256, key.shape, generator=noise))

    def pair(self, P: Any) -> tuple[Tensor, Tensor]:
        m, n, _ = P.frame.shape
        k, r = self.config.bases, self.config.rank
        seed = int.from_bytes(int(byte) for byte in P.key.tolist())
        bound = 1 / math.sqrt(n)
        start = torch.empty(r, n, dtype=torch.float32).uniform_(-bound, bound, generator=rng(seed, 0, "start"))
        A = start.to(P.a) + _Mix.apply(P.a, Bases(seed, "A", k, (r, n)))
        return A, _Mix.apply(P.b, Bases(seed, "B", k, (m, r)))

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        x = F.dropout(x, self.config.dropout, training)
        A, B = self.pair(P)
        return self.scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


@dataclass(frozen=True)
class Bases:
    """k random matrices of one shape, entries ~ U(−1, 1)/√k, a block of them at a time.

    Attributes:
        seed, stream: what they depend on, with the block. number: k. shape: of each.
    """

    seed: int
    stream: str
    number: int
    shape: tuple[int, int]

    def blocks(self, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Which, and these flat [count, …], in the dtype and on the device of `like`."""
        size = math.prod(self.shape)
        step = max(1, BLOCK // size)
        bound = 1 / math.sqrt(self.number)
        for first in range(0, self.number, step):
            some = slice(first, min(self.number, first + step))
            drawn = torch.empty(some.stop - first, size, dtype=torch.float32)
            yield some, drawn.uniform_(-bound, bound, generator=rng(self.seed, 0, f"{self.stream}/{first}")).to(like)

    def mix(self, c: Tensor) -> Tensor:
        """Σ c_i basis_i for c [k]."""
        total = c.new_zeros(math.prod(self.shape))
        for some, block in self.blocks(c):
            total.addmv_(block.t(), c[some])
        return total.view(self.shape)

    def against(self, M: Tensor) -> Tensor:
        """⟨M, basis_i⟩ [k]."""
        flat = M.reshape(-1)
        return torch.cat([block.mv(flat) for _, block in self.blocks(M)])


class _Mix(torch.autograd.Function):
    """`Bases.mix`."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, bases: Bases) -> Tensor:
        ctx.bases = bases
        return bases.mix(c)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Against.apply(g, ctx.bases), None


class _Against(torch.autograd.Function):
    """`Bases.against`, which is the derivative of the other, and the other way round."""

    @staticmethod
    def forward(ctx: Any, M: Tensor, bases: Bases) -> Tensor:
        ctx.bases = bases
        return bases.against(M)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Mix.apply(g, ctx.bases), None


def build(config: Config) -> Nola:
    return Nola(config)
