"""A model at a strength between its base and itself: W + λ ΔW on every adapted layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .base import Adapter, Weight
from .layers import adapted, disabled, refuse_merged


class Scaled(Adapter):
    """A method whose ΔW is λ times that of another; factors need not be linear in ΔW, so they stay as they are."""

    def __init__(self, method: Adapter, factor: float) -> None:
        super().__init__(method.config)
        self.method, self.factor = method, factor

    def delta(self, P: Any, W: Weight) -> Tensor:
        return self.factor * self.method.delta(P, W)

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        return self.factor * self.method.apply(P, x, W, training)


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Inside, the active adapters' changes count `factor` times: to ask the model, or to merge it so.

    At 0 the base answers and at 1 the adapted model, to the bit. An adapter is not saved from inside.

    Raises:
        InputError: the model is merged.
    """
    if factor == 0:
        with disabled(model):
            yield
        return
    refuse_merged(model)
    before = {layer: layer.methods for layer in adapted(model).values()}
    try:
        for layer, methods in before.items() if factor != 1 else ():
            layer.methods = {name: Scaled(method, factor) for name, method in methods.items()}
        yield
    finally:
        for layer, methods in before.items():
            layer.methods = methods
