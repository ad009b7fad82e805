"""What an adapter is: a change ΔW of a weight that is not trained, by a few parameters P that are.

    y = x (W + ΔW(P))ᵀ + b

A method says which tensors P holds for a weight [m, n], how they begin, what ΔW they stand for, and how to apply it
without forming it. Which layers get one, freezing, several adapters by name, merging and saving are `layers.py` and
`peft.py`, and the same for every method; so is what a method begins from, beside the weight (`begin.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..options import Options, option

Weight = Callable[[], Tensor]
"""The adapted weight [m, n], made when it is called: it may be stored transposed or in fewer bits. Where it is made for
one forward only, it has `again`, which makes it anew: what a backward needs of it is that, not the tensor."""


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
    """ΔW = s B A as PEFT stores a LoRA, with s = α/r, or α/√r where the configuration says rsLoRA.

    Attributes:
        A: [r, n]. B: [m, r]. alpha: α.
    """

    A: Tensor
    B: Tensor
    alpha: float


Layers = Mapping[str, tuple["Adapter", Any]]
"""Path of a layer → the method with its options there, and its tensors."""


class Adapter:
    """One method with its options. `P` holds the tensors that `shapes` and `frozen` name, as attributes.

    Attributes:
        id: of the method. config: its options.
        needs: what it begins from beside the weight: the gradient of the weight on some of the data, or the inputs of
            the layer on them; its options then say how many (`rows`), and of inputs how directions are found and dealt
            out (`rank`, `rho`, `tau`, see `eva`).
        between: it has something to do or to say between the steps of a run (`sizes`, `counts`).
        runs_only: why only a run of `fallline train` can have it; empty: any loop can.
        peft_type: under which PEFT stores it.
    """

    id: ClassVar[str]
    needs: ClassVar[Literal["", "gradient", "inputs"]] = ""
    between: ClassVar[bool] = False
    runs_only: ClassVar[str] = ""
    peft_type: ClassVar[str] = "LORA"

    def __init__(self, config: Any, size: int | None = None) -> None:
        self.config, self._size = config, size

    @property
    def size(self) -> int:
        """What tells the shapes of its tensors at one layer from those at another, or at another time."""
        return self.first_size if self._size is None else self._size

    @property
    def first_size(self) -> int:
        """The size at the start: the rank, unless a method says otherwise."""
        rank: int = self.config.rank
        return rank

    @property
    def resizes(self) -> bool:
        """Whether `sizes` ever asks for other sizes, with these options; only a run can follow."""
        return False

    def at(self, path: str) -> Adapter:
        """The method at a layer, where it knows something of its own of each.

        Raises:
            InputError: of this one it knows nothing.
        """
        return self

    def shapes(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of the parameters for a weight [m, n].

        Raises:
            InputError: such a weight cannot have this adapter.
        """
        raise NotImplementedError

    def frozen(self, m: int, n: int) -> Mapping[str, tuple[int, ...]]:
        """Name → shape of what belongs to the adapter and is not trained; it is part of the state."""
        return {}

    def shared(self, sizes: Sequence[tuple[int, int]], noise: torch.Generator) -> Mapping[str, Tensor]:
        """Tensors that all layers have as one: `P.shared.NAME` for weights of these sizes. They are not trained and not
        part of the state: they follow from `noise`, which draws on the CPU."""
        return {}

    def init(self, P: nn.Module, W: Weight, noise: torch.Generator) -> None:
        """Fill `P`'s tensors, which are zero, in place. `noise` draws on the CPU. Without `needs`."""
        raise NotImplementedError

    def begin(self, P: nn.Module, W: Weight, noise: torch.Generator, found: Tensor) -> None:
        """The same with what `needs` asks for: the gradient [m, n], or the r directions [r, n] in which the inputs vary
        most, orthonormal."""
        raise NotImplementedError

    def at_size(self, size: int) -> Adapter:
        """The method at another size, and as strong: its s is the same. One whose s follows from its rank says how."""
        return type(self)(self.config, size)

    def sizes(self, layers: Layers, step: int, steps: int) -> Mapping[str, int]:
        """Path → another size that a layer's adapter is to have in update `step`, from 0, of `steps`; the others keep
        theirs. Asked of the first layer's method, before each update. It may write to tensors that are not trained.

        Args:
            layers: path → the method there and its tensors.
            step, steps: which update of how many.
        """
        return {}

    def carry(self, before: Any, after: Any, noise: torch.Generator) -> Mapping[str, Tensor]:
        """Fill the tensors `after`, of this size, from those `before`, of another; those of a shape that stays are
        taken over already, all others are zero. `noise` draws on the CPU.

        Returns:
            Name of a parameter → `Change.index`, for each that is not its old one's leading corner.
        """
        raise NotImplementedError

    def counts(self, layers: Layers) -> Mapping[str, Tensor]:
        """Name → number for the run's record, after each update; asked of the first layer's method."""
        return {}

    def check_base(self, content: str) -> None:
        """
        Raises:
            InputError: it is for another model than the one with this `models.identity.fingerprint`.
        """

    def part(self) -> Any:
        """What takes part in a run for it, as a `contracts.Part`; None: nothing of its own."""
        return None

    def coefficients(self, layers: int) -> Mapping[str, float]:
        """Name → coefficient of each term that its layers, so many, add to the loss with `fallline.step.aux`."""
        return {}

    def beside(self) -> Any:
        """What is saved beside its tensors, by its own `save(folder)`; None: nothing."""
        return None

    def delta(self, P: Any, W: Weight) -> Tensor:
        """ΔW [m, n], in at least float32: for merging, for tests."""
        raise NotImplementedError

    def apply(self, P: Any, x: Tensor, W: Weight, training: bool) -> Tensor:
        """x ΔWᵀ [..., m] for x [..., n], without forming ΔW. `training`: dropout is on.

        Products with `P`'s matrices go through `fallline.per_example.linear`, which knows per-example gradients, and
        vectors among its parameters through `vectors`.
        """
        raise NotImplementedError

    def linear(self, P: Any, x: Tensor, W: Weight, bias: Tensor | None, training: bool) -> Tensor:
        """x (W + ΔW)ᵀ + b. A method may have a faster way than this one, with the same result."""
        return F.linear(x, W(), bias) + self.apply(P, x, W, training)

    def after_update(self, P: Any) -> None:
        """What the method does to its parameters after each update of the optimizer, in place."""

    def after_updates(self, P: Sequence[Any]) -> None:
        """The same where layers depend on each other: with all of them, asked of the first layer's method."""

    def factors(self, P: Any) -> LoraFactors:
        """ΔW as a LoRA. α is the rank, so that s = 1, unless `peft_config` says otherwise."""
        raise NotImplementedError

    def stored(self, P: Any) -> Mapping[str, Tensor]:
        """What PEFT stores of a layer: the end of the tensor's name → tensor."""
        found = self.factors(P)
        return {"lora_A.weight": found.A, "lora_B.weight": found.B}

    def stored_once(self, P: Any) -> Mapping[str, Tensor]:
        """What PEFT stores beside the layers, of what they share: name → tensor."""
        return {}

    def peft_config(self) -> dict[str, Any]:
        """What PEFT's configuration says of the method: all but ranks and α of a LoRA, which are read off `factors`."""
        return {"lora_dropout": 0.0, "use_rslora": False}
