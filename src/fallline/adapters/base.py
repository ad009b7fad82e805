"""What an adapter is: a change ΔW of a weight that is not trained, by a few parameters P that are.

    y = x (W + ΔW(P))ᵀ + b

A method says which tensors P holds for a weight [m, n], how they begin, what ΔW they stand for, and how to apply it
without forming it. Which layers get one, freezing, several adapters by name, merging and saving are `layers.py` and
`peft.py`, and the same for every method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..options import Options, option

Weight = Callable[[], Tensor]
"""The adapted weight [m, n], made when it is called: it may be stored transposed or in fewer bits."""


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(Options):
    """Options of every adapter."""

    targets: str | tuple[str, ...] = option(
        "all-linear",
        "which linear layers: all-linear (all but the head), or names or patterns of module paths such as "
        "q_proj, layers.3.mlp.up_proj, model.layers.2?.self_attn.*",
        source="QLoRA (2023), section 4",
    )

    def names(self) -> tuple[str, ...]:
        """`targets` as a list."""
        return (self.targets,) if isinstance(self.targets, str) else self.targets


class LoraFactors(NamedTuple):
    """ΔW = s B A as PEFT stores it, with s = α/r, or α/√r where the configuration says rsLoRA.

    Attributes:
        A: [r, n]. B: [m, r]. alpha: α.
    """

    A: Tensor
    B: Tensor
    alpha: float


class Adapter:
    """One method with its options. `P` holds the tensors that `shapes` names, as attributes.

    Attributes:
        id: of the method. config: its options.
    """

    id: ClassVar[str]

    def __init__(self, config: Any) -> None:
        self.config = config

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of the parameters for a weight [m, n]."""
        raise NotImplementedError

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        """Fill `P`'s parameters, which are zero, in place. `noise` draws on the CPU."""
        raise NotImplementedError

    def delta(self, P: Any, W: Weight) -> Tensor:
        """ΔW [m, n], in at least float32: for merging, for tests."""
        raise NotImplementedError

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        """x ΔWᵀ [..., m] for x [..., n], without forming ΔW. `training`: dropout is on.

        Products with `P`'s parameters go through `fallline.per_example.linear`, which knows per-example gradients.
        """
        raise NotImplementedError

    def linear(self, P: Any, x: Tensor, W: Weight, bias: Tensor | None, training: bool) -> Tensor:
        """x (W + ΔW)ᵀ + b. A method may have a faster way than this one, with the same result."""
        return F.linear(x, W(), bias) + self.apply(P, x, W, training)

    def factors(self, P: Any) -> LoraFactors:
        """ΔW as a LoRA."""
        raise NotImplementedError

    def peft_config(self) -> dict[str, Any]:
        """What of PEFT's LoraConfig is the same for all layers."""
        raise NotImplementedError
