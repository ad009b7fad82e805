"""Frozen linear layers in few bits, for adapters beside them: bitsandbytes stores the weights, torch multiplies.

    nf4     W_i = a_b code[q_i], q_i in 0 … 15, a_b of the block b of 64 neighbours        4.5 bits a weight
    int8    W_ij = s_i q_ij / 127, q_ij in −127 … 127, s_i of the row i                    8 bits, and 32 a row

    y = x Wᵀ + b,   ∂L/∂x = g W,   g = ∂L/∂y

W [m, n] is made anew from its bits in every forward and every backward, and is not kept between them, so one layer's is
there at a time. The product is that of the weight which the bits stand for: inputs are not rounded, as LLM.int8() does,
and so the gradient by x is exact. Weights are rounded on the CPU, wherever they lie, so that the bits are the same.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError

Kind = Literal["nf4", "int8"]

BLOCK = 64
"""Weights of nf4 that share a scale; QLoRA (2023), section 3, and bitsandbytes' default."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What bitsandbytes can make the weights in."""


class QuantisedLinear(nn.Module):
    """A linear layer whose frozen weight is held in few bits. Made by `quantise` out of an `nn.Linear`.

    Attributes:
        weight: the bits, as bitsandbytes packs them. scales: a, or s. bias: as it was.
        in_features, out_features: n, m. kind: how. dtype: in which W is made.
    """

    weight: nn.Parameter
    scales: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    kind: Kind
    dtype: torch.dtype

    def matrix(self) -> Tensor:
        """W [m, n], made anew."""
        fun = library().functional
        if self.kind == "int8":
            made: Tensor = fun.int8_vectorwise_dequant(self.weight.detach(), self.scales.detach())
            return made.to(self.dtype)
        m, n = self.out_features, self.in_features
        # a block a row: with AVX-512, bitsandbytes 0.50.2 takes wrong scales where rows of 32, 96, … end in a block
        shape = torch.Size((m * n // BLOCK, BLOCK) if m * n % BLOCK == 0 else (1, m * n))
        state = fun.QuantState(
            absmax=self.scales.detach(), shape=shape, dtype=self.dtype, blocksize=BLOCK, quant_type="nf4"
        )
        return cast(Tensor, fun.dequantize_4bit(self.weight.detach(), state)).reshape(m, n)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, Made(self.matrix), self.bias)

    def extra_repr(self) -> str:
        return f"{self.kind}, in_features={self.in_features}, out_features={self.out_features}"


class Made:
    """A weight that is there for the time of a forward; a backward makes it `again`."""

    def __init__(self, again: Callable[[], Tensor]) -> None:
        self.again, self._now = again, again()

    def __call__(self) -> Tensor:
        return self._now


def frozen_linear(x: Tensor, W: Made, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, for a weight [m, n] that is made again in the backward.

    Args:
        x: [..., n]; the product runs in its dtype, or in that of autocast. W, bias: they get no gradient.
    """
    if torch.is_autocast_enabled(x.device.type):  # inside the function nothing is cast for us
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _FrozenLinear.apply(x, W, None if bias is None else bias.detach().to(x.dtype))
    return y


class _FrozenLinear(torch.autograd.Function):
    """`frozen_linear`. Its backward is made of differentiable operations, so it has a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Made, bias: Tensor | None) -> Tensor:
        ctx.again = W.again
        return F.linear(x, W().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g @ ctx.again().to(g.dtype), None, None


@torch.no_grad()
def quantise(model: nn.Module, kind: Kind) -> None:
    """Round the weights of all linear layers but the head to few bits, in place, and freeze them; embeddings, head,
    norms and biases stay as they are. A layer changes its class and keeps its identity, its path and its hooks.

    Args:
        model: its weights are in float32, bfloat16 or float16; nothing of it has an adapter yet.
        kind: ``nf4``, as QLoRA does without its second rounding, of the scales; or ``int8``, a scale for each row.

    Raises:
        InputError: bitsandbytes is missing, a kind or dtype that is not known, or a layer with a matrix that would
            stay as it is. The model is then as it was.
    """
    if kind not in get_args(Kind):
        raise InputError(f"weights are quantised to {' or '.join(get_args(Kind))}, got {kind!r}")
    library()
    layers = chosen(model)
    for layer in layers:
        W = layer.weight.detach()
        bits, scales = rounded(W.cpu(), kind)
        layer.kind, layer.dtype = kind, W.dtype
        layer.weight = nn.Parameter(bits.to(W.device), requires_grad=False)
        layer.scales = nn.Parameter(scales.to(W.device), requires_grad=False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        layer.__class__ = QuantisedLinear


def chosen(model: nn.Module) -> list[Any]:
    """The layers to quantise.

    Raises:
        InputError: there is none, or one whose matrix would stay as it is.
    """
    owner: Any = model
    head = owner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = []
    for path, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            if module.weight.dtype not in DTYPES:
                raise InputError(f"the weight of {path} is {module.weight.dtype}, which cannot be quantised")
            found.append(module)
        elif module is not head and not isinstance(module, nn.Embedding):
            left = [name for name, p in module.named_parameters(recurse=False) if p.ndim > 1]
            if left:
                raise InputError(
                    f"{path} is a {type(module).__name__}, whose {left[0]} cannot be quantised: only linear layers of "
                    "torch can; leave out 'quantise'"
                )
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layer to quantise")
    return found


def rounded(W: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Bits and scales of a weight [m, n] on the CPU."""
    fun = library().functional
    if kind == "int8":
        bits, scales, _ = fun.int8_vectorwise_quant(W.half())  # as bitsandbytes' own layers do
        return bits, scales
    bits, state = fun.quantize_4bit(W.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return bits, state.absmax


def kind_of(model: nn.Module) -> Kind | None:
    """How a model's layers are quantised, if they are."""
    return next((module.kind for module in model.modules() if isinstance(module, QuantisedLinear)), None)


def stands_for(model: nn.Module) -> dict[int, int]:
    """Identity of a parameter → how many weights of the model it stands for, where that is not its own size."""
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            found[id(module.weight)] = module.out_features * module.in_features
            found[id(module.scales)] = 0
    return found


def count(model: nn.Module) -> int:
    """The number of a model's parameters, those in few bits included."""
    other = stands_for(model)
    return sum(other.get(id(p), p.numel()) for p in model.parameters())


def library() -> Any:
    """bitsandbytes.

    Raises:
        InputError: it is not installed, or cannot be used.
    """
    if "bitsandbytes" in sys.modules and sys.modules["bitsandbytes"] is not None:
        return sys.modules["bitsandbytes"]
    told = logging.getLogger("bitsandbytes")
    before = told.level
    told.setLevel(logging.ERROR)  # it warns of kernels that are not asked for here
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            f"quantised weights need the package bitsandbytes ({error}); pip install 'fallline[quantised]'"
        ) from None
    finally:
        told.setLevel(before)
    return bitsandbytes
