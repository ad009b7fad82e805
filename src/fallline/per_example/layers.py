"""How each kind of layer tells a watch about its per-example gradients.

The layer's operation becomes an autograd function that computes the same output and the same gradient for its input;
for its parameters it hands inputs and output gradients to the watch instead of forming the batch's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ..errors import InputError

if TYPE_CHECKING:
    from .watch import Use, Watch

Rule = Callable[..., Tensor]
"""(watch, layer, input) → output, with the layer's own parameters watched where they are trained."""


class _Linear(torch.autograd.Function):
    """x Wᵀ + b for x [..., n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, uses: tuple[Use | None, Use | None]) -> Tensor:
        ctx.save_for_backward(x if uses[0] is not None else None, W if ctx.needs_input_grad[0] else None)
        ctx.uses = uses
        return F.linear(x, W, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        weight, bias = ctx.uses
        dx = None if W is None else g @ W
        if weight is not None:
            weight.outer(x, g)
        if bias is not None:
            bias.summed(g)
        return dx, None, None, None


def watched_linear(watch: Watch, x: Tensor, W: Tensor, b: Tensor | None, name: str) -> Tensor:
    """`F.linear` with W and b watched. name: of the layer, for errors."""
    x = watch.rowwise(x, name)
    uses = watch.use(W), None if b is None else watch.use(b)
    if torch.is_autocast_enabled(x.device.type):  # inside the function nothing is cast for us
        x = x.to(torch.get_autocast_dtype(x.device.type))
    W, b = W.to(x.dtype), None if b is None else b.to(x.dtype)
    y: Tensor = _Linear.apply(x, W, b, uses)
    return y


def _linear_layer(watch: Watch, layer: nn.Linear, x: Tensor) -> Tensor:
    return watched_linear(watch, x, layer.weight, layer.bias, watch.path(layer))


class _Conv1D(torch.autograd.Function):
    """x W + b for x [..., n], W [n, m]: GPT-2's linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, uses: tuple[Use | None, Use | None]) -> Tensor:
        ctx.save_for_backward(x if uses[0] is not None else None, W if ctx.needs_input_grad[0] else None)
        ctx.uses = uses
        return F.linear(x, W.t(), b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        weight, bias = ctx.uses
        if weight is not None:
            weight.outer(g, x)
        if bias is not None:
            bias.summed(g)
        return None if W is None else g @ W.t(), None, None, None


def _conv1d_layer(watch: Watch, layer: Conv1D, x: Tensor) -> Tensor:
    x = watch.rowwise(x, watch.path(layer))
    W: Tensor = layer.weight
    b: Tensor = layer.bias
    uses = watch.use(W), watch.use(b)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W, b = x.to(dtype), W.to(dtype), b.to(dtype)
    y: Tensor = _Conv1D.apply(x, W, b, uses)
    return y


class _Embedding(torch.autograd.Function):
    """W[ids] for ids [...]."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, W: Tensor, padding: int | None, use: Use) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.use = padding, use
        return F.embedding(ids, W)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            g = g.masked_fill((ids == ctx.padding).unsqueeze(-1), 0)
        ctx.use.rows(ids, g)
        return None, None, None, None


def _embedding_layer(watch: Watch, layer: nn.Embedding, ids: Tensor) -> Tensor:
    if ids.dim() == 1 and len(ids) == watch.layout.length:
        raise InputError(
            f"per-example gradients: {watch.path(layer)} gets {len(ids)} words, which may be one a row or those of "
            "each row; give them for each row"
        )
    ids = watch.rowwise(ids.unsqueeze(-1), watch.path(layer)).squeeze(-1)
    use = watch.use(layer.weight, ids)
    if use is None:
        return F.embedding(ids, layer.weight)
    y: Tensor = _Embedding.apply(ids, layer.weight, layer.padding_idx, use)
    return y


class _Spread(torch.autograd.Function):
    """A vector p [...] as each example's own, [B + 1, ...]; the last is nobody's."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, number: int, use: Use) -> Tensor:
        ctx.use = use
        return p.expand(number + 1, *p.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        ctx.use.whole(g[:-1].flatten(1).unsqueeze(1))
        return None, None, None


def spread(watch: Watch, p: Tensor, x: Tensor) -> Tensor:
    """p [...] laid out to meet x [R, (L,) ..., p's shape]: its value, with each example's gradient apart."""
    use = watch.use(p)
    if use is None:
        return p
    number = watch.layout.examples
    own: Tensor = _Spread.apply(p, number, use)
    middle = (1,) * (x.dim() - p.dim() - (1 if watch.layout.packed is None else 2))
    if watch.layout.packed is None:
        return own[:-1].view(number, *middle, *p.shape)
    at = own.index_select(0, watch.layout.packed.owner)
    return at.view(watch.layout.rows, -1, *middle, *p.shape)


def _layer_norm(watch: Watch, layer: nn.LayerNorm, x: Tensor) -> Tensor:
    x = watch.rowwise(x, watch.path(layer), features=layer.weight.dim(), flat=False)
    y = F.layer_norm(x, layer.normalized_shape, None, None, layer.eps)
    y = y * spread(watch, layer.weight, x).to(y.dtype)
    return y if layer.bias is None else y + spread(watch, layer.bias, x).to(y.dtype)


def _rms_norm(watch: Watch, layer: nn.RMSNorm, x: Tensor) -> Tensor:
    x = watch.rowwise(x, watch.path(layer), features=layer.weight.dim(), flat=False)
    return F.rms_norm(x, layer.normalized_shape, None, layer.eps) * spread(watch, layer.weight, x).to(x.dtype)


def _own_norm(watch: Watch, layer: nn.Module, x: Tensor) -> Tensor:
    """A norm that 🤗 wrote for a model: its own forward, on a gain with each example apart."""
    x = watch.rowwise(x, watch.path(layer), flat=False)
    gain: Any = layer.weight
    own: Any = layer._parameters
    try:
        own["weight"] = spread(watch, gain, x)
        y: Tensor = type(layer).forward(layer, x)
    finally:
        own["weight"] = gain
    return y


class _Conv(torch.autograd.Function):
    """A convolution. Each example's weight gradient is that of one group of a convolution with B times the groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, uses: Any, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.uses, ctx.how = uses, how
        stride, padding, dilation, groups = how
        return torch.convolution(x, W, b, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        weight, bias = ctx.uses
        stride, padding, dilation, groups = ctx.how

        def gradient(x: Tensor, g: Tensor, W: Tensor, groups: int, mask: list[bool]) -> Any:
            rest = (stride, padding, dilation, False, [0] * len(stride), groups, mask)
            return torch.ops.aten.convolution_backward(g, x, W, None, *rest)

        dx = gradient(x, g, W, groups, [True, False, False])[0] if ctx.needs_input_grad[0] else None
        if weight is not None and not len(x):
            weight.whole(W.new_zeros(0, len(W), W[0].numel()))
        elif weight is not None:
            number = len(x)
            side = (1, -1, *x.shape[2:]), (1, -1, *g.shape[2:])
            many = W.repeat(number, *[1] * (W.dim() - 1))
            each = gradient(x.reshape(side[0]), g.reshape(side[1]), many, groups * number, [False, True, False])[1]
            weight.whole(each.view(number, len(W), -1))
        if bias is not None:
            bias.summed(g.flatten(2).transpose(1, 2))
        return dx, None, None, None, None


def _conv_layer(watch: Watch, layer: Any, x: Tensor) -> Tensor:
    b = layer.bias
    uses = watch.use(layer.weight), None if b is None else watch.use(b)
    x = watch.rows_only(x, watch.path(layer))
    y: Tensor = _Conv.apply(x, layer.weight, b, uses, (layer.stride, layer.padding, layer.dilation, layer.groups))
    return y


class _Functions(TorchFunctionMode):
    """Inside, `F.embedding` and `F.linear` of a layer's weight are watched."""

    def __init__(self, watch: Watch, layer: Any) -> None:
        super().__init__()
        self.watch, self.layer = watch, layer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            weight = args[1] if len(args) > 1 else None
            if weight is self.layer.weight and function is F.embedding:
                return _embedding_layer(self.watch, self.layer, args[0])
            if weight is self.layer.weight and function is F.linear:
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                return watched_linear(self.watch, args[0], weight, bias, self.watch.path(self.layer))
            return function(*args, **(kwargs or {}))


def _own_forward(watch: Watch, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """A model's own kind of embedding or linear layer, such as one that scales: its own forward around the usual
    function. Whatever else it does with its weight is noticed in the backward."""
    with _Functions(watch, layer):
        y: Tensor = type(layer).forward(layer, *args, **kwargs)
    return y


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear_layer,
    Conv1D: _conv1d_layer,
    nn.Embedding: _embedding_layer,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.Conv1d: _conv_layer,
    nn.Conv2d: _conv_layer,
    nn.Conv3d: _conv_layer,
}


def rule(layer: Any) -> Rule | None:
    """How to watch this layer, or None."""
    if type(layer) in RULES:
        return None if odd(layer) else RULES[type(layer)]
    names = [name for name, _ in layer.named_parameters()]
    if isinstance(layer, nn.Embedding | nn.Linear) and not odd(layer):
        return _own_forward
    if type(layer).__name__.endswith("RMSNorm") and names == ["weight"] and layer.weight.dim() == 1:
        return _own_norm
    return None


def odd(layer: Any) -> str:
    """An option of the layer that its rule does not know, or nothing."""
    if isinstance(layer, nn.Embedding):
        options = [o for o in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(layer, o)]
        return options[0] if options else ""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        text = isinstance(layer.padding, str)
        return "padding_mode" if layer.padding_mode != "zeros" else "padding as text" if text else ""
    return ""


def known() -> str:
    """The layers there are rules for."""
    return ", ".join(sorted(kind.__name__ for kind in RULES)) + ", *RMSNorm, and layers with an adapter"


def matrix(p: Tensor) -> tuple[int, int]:
    """A parameter's shape as a matrix: a vector is one row, further axes join the columns."""
    return (1, p.numel()) if p.dim() < 2 else (len(p), math.prod(p.shape[1:]))
