"""An adapter that counts as much as its gate says of each input: y = base(x) + w(input) change(x).

    base: the model with its adapters off, which also gives the gate what it looks at

What a forward without a cache is given is one input a row; padding is told by a two-dimensional attention mask. The
weights of a row then hold for all that follows in the cache: a prompt's for its answer. With w = 0 the base answers, to
the bit.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..calibrate import evaluating
from ..errors import InputError
from .base import Adapter, LoraFactors, Weight
from .layers import Adapted, adapted, disabled
from .o3_gate import Gate, pooled, states
from .scaling import Scaled


class Gating:
    """A gate at work on a model.

    Args:
        model: a 🤗 causal language model with the adapter.
        name: of the adapter.
        gate: what it is told by.

    Attributes:
        now: [R], the weight of each row of the forward that is going on, or went on last.
    """

    def __init__(self, model: Any, name: str, gate: Gate) -> None:
        self.model, self.gate = model, gate
        self.now = torch.ones(0)
        self._kept: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()  # cache → weights of its rows
        self._asking = False
        self._layers = [layer for layer in adapted(model).values() if name in layer.adapters]
        for layer in self._layers:
            layer.methods = layer.methods | {name: Gated(layer.methods[name], self)}
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(self._before, with_kwargs=True)
        decoder.register_forward_hook(self._after, with_kwargs=True)

    def _on(self, layer: Adapted) -> bool:
        found = (layer.methods[name] for name in getattr(layer, "active", ()))
        return any(getattr(plain(method), "gating", None) is self for method in found)

    def _before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._asking or not any(map(self._on, self._layers)):
            return
        ids: Tensor | None = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise InputError("the gate of adapter 'o3' reads tokens; call the model with input_ids")
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            if cache not in self._kept:
                raise InputError("the gate of adapter 'o3' has not seen how this cache began; begin it with this model")
            self.now = self._kept[cache]
            return
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise InputError("the gate of adapter 'o3' takes one input a row: packed rows cannot be gated")
        row = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
        owner = row if mask is None else torch.where(mask.bool(), row, -1)
        self._asking = True
        try:
            with disabled(self.model), evaluating(self.model), torch.no_grad():
                told = {key: kwargs[key] for key in ("attention_mask", "position_ids") if key in kwargs}
                z = pooled(states(self.model, input_ids=ids, **told), owner, len(ids))
        finally:
            self._asking = False
        self.now = self.gate.weights(z).to(ids.device)

    def _after(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None and not self._asking:
            self._kept[cache] = self.now

    def of(self, x: Tensor) -> Tensor:
        """w for what a layer is given, [R, …, n]: [R, 1, …]."""
        if x.ndim < 2 or len(x) != len(self.now):
            raise InputError(
                "the gate of adapter 'o3' cannot tell whose tokens a layer is given; leave it out of 'targets'"
            )
        return self.now.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


NO_CHANGE = (
    "adapter 'o3' counts for each input as much as its gate says: it is no one change of the weights, and cannot be "
    "merged or measured as one"
)


class Gated(Adapter):
    """A method whose change counts as much as a gate says."""

    id = "o3"

    def __init__(self, method: Adapter, gating: Gating) -> None:
        super().__init__(method.config)
        self.method, self.gating = method, gating

    def delta(self, P: Any, W: Weight) -> Tensor:
        raise InputError(NO_CHANGE)

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        return self.gating.of(x) * self.method.apply(P, x, W, training)

    def factors(self, P: Any) -> LoraFactors:
        return self.method.factors(P)

    def peft_config(self) -> dict[str, Any]:
        return self.method.peft_config()

    def beside(self) -> Gate:
        return self.gating.gate


def plain(method: Adapter) -> Adapter:
    """A method that may be `scaled`, unscaled."""
    return method.method if isinstance(method, Scaled) else method


def gated(model: nn.Module) -> bool:
    """Does an adapter that is on count by a gate?"""
    return any(
        isinstance(plain(layer.methods[name]), Gated) for layer in adapted(model).values() for name in layer.active
    )


def refuse_gated(model: nn.Module, name: str, what: str) -> None:
    """Before labels and answers are shown to a model whose gate is for prompts.

    Raises:
        InputError: the model has a gate.
    """
    if gated(model):
        raise InputError(
            f"{name} has an adapter 'o3', which counts by what is asked: {what} shows answers with their prompts, in "
            "packed rows; ask it by fallline generate or chat"
        )
