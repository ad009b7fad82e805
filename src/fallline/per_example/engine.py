"""The engine: which layers a model has, and a watch over one forward and backward of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError
from .forms import Scratch
from .layers import known, odd, rule
from .layout import layout
from .readers import Reader
from .watch import ACTIVE, Watch, Weigh, watching


class PerExample:
    """Per-example gradients of a model's trained parameters.

    Args:
        model: any module whose trained parameters are in layers that `known()` lists. Examples must not see each other.
        objective: a module with trained parameters of its own, named ``objective.…``.

    Raises:
        InputError: a layer it cannot handle, by name.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> norms = Norms()
        >>> with PerExample(model).watch(2, norms):
        ...     model(torch.ones(2, 3)).sum().backward()
        >>> norms.squared["weight"]
        tensor([3., 3.])
    """

    def __init__(self, model: nn.Module, objective: nn.Module | None = None) -> None:
        self.params: dict[str, nn.Parameter] = {}
        self._layers: list[tuple[str, nn.Module]] = []
        for prefix, root in (("", model), ("objective.", objective)):
            if root is not None:
                self.params |= {f"{prefix}{n}": p for n, p in root.named_parameters() if p.requires_grad}
                self._layers += _layers(root, prefix)
        self._name = {id(p): name for name, p in self.params.items()}
        self._scratch: dict[torch.device, Scratch] = {}
        roots = [root for root in (model, objective) if root is not None]
        self._coupling = [m for root in roots for m in root.modules() if isinstance(m, _BatchNorm)]

    def fits(self, params: Mapping[str, nn.Parameter]) -> bool:
        """Are these the parameters it was made for?"""
        return [*params] == [*self.params] and all(params[n] is p for n, p in self.params.items())

    @contextmanager
    def watch(
        self,
        batch: Mapping[str, Tensor] | int,
        *readers: Reader,
        keep: bool = False,
        weigh: Weigh | None = None,
    ) -> Iterator[Watch]:
        """Inside, run forward and one backward. When it ends, readers have their answers and `.grad` has the gradient.

        Args:
            batch: has `example_id` [B] and, when packed, `segment` [R, L]; or B, the number of rows.
            readers: see `readers.py`.
            keep: leave `.grad` alone and keep the per-example gradients, each parameter's as factors or product,
                whichever costs less, for `Watch.add`.
            weigh: (parameter, squared norms [B], as of `Norms(bound=True)`) → weights [B] of its examples in the sum
                that goes to `.grad`.

        Raises:
            InputError: a layer's input cannot be parted into examples, or a trained parameter is used past its layer.
        """
        if ACTIVE:
            raise InputError("per-example gradients are watched already; end that watch first")
        frozen = [name for name, p in self.params.items() if not p.requires_grad]
        if frozen:
            raise InputError(f"per-example gradients: {frozen[0]!r} was frozen since; make the engine anew")
        if any(m.training for m in self._coupling):
            raise InputError("per-example gradients: batch normalisation in training lets examples see each other")
        device = next(iter(self.params.values())).device if self.params else torch.device("cpu")
        made = layout(batch, device)
        scratch = self._scratch.setdefault(device, Scratch(device))
        watch = Watch(made, self.params, self._name, self._layers, readers, keep, weigh, scratch)
        watch.begin(readers)
        hooks = []
        before = {name: p.grad for name, p in self.params.items()}
        ACTIVE.append(watch)
        try:
            hooks += [p.register_hook(partial(watch.bypassed, name)) for name, p in self.params.items()]
            for _, layer in self._layers:
                layer.forward = _Forward(watch, layer)
            with torch.compiler.set_stance("force_eager"):
                yield watch
            watch.settle()
        except BaseException:
            for name, p in self.params.items():
                p.grad = before[name]  # where there was one, it may have been added to
            raise
        finally:
            ACTIVE.pop()
            for _, layer in self._layers:
                vars(layer).pop("forward", None)
            for hook in hooks:
                hook.remove()


@contextmanager
def grads_aside(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters have no `.grad`; afterwards they have the ones they had."""
    before = [(p, p.grad) for p in params]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad


class _Forward:
    """The forward of a layer that is watched; in a copy of the layer, its own."""

    def __init__(self, watch: Watch | None, layer: nn.Module) -> None:
        self.watch, self.layer = watch, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.watch is not None and self.watch is watching():
            return self.watch.run(self.layer, *args, **kwargs)
        plain: Tensor = type(self.layer).forward(self.layer, *args, **kwargs)
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return _Forward(None, copy.deepcopy(self.layer, memo))


def _layers(root: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """The layers whose own parameters are trained, by path.

    Raises:
        InputError: one is of an unknown kind.
    """
    found, seen = [], set()
    inside: str | None = None  # a layer whose parameters go through functions that know the watch
    for path, module in root.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
        if getattr(module, "per_example", False):
            inside = f"{path}."
        elif own and rule(module) is None:
            option = f" with {odd(module)}" if odd(module) else ""
            raise InputError(
                f"per-example gradients: {prefix}{path or 'the model'} is a {type(module).__name__}{option}, whose "
                f"{own[0]} is trained; known are {known()}"
            )
        elif own and "forward" in vars(module):
            raise InputError(f"per-example gradients: the forward of {prefix}{path} was replaced, so it is not known")
        elif own and id(module) not in seen:
            seen.add(id(module))
            found.append((f"{prefix}{path}", module))
    return found
