"""A backward pass that is watched: per-example gradients as they arise, and what becomes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .forms import Form, Grams, Outer, Pair, Rows, Scratch, Whole, blocks
from .joined import join
from .layers import matrix, rule, spread, watched_linear
from .layout import Layout, Spans
from .readers import Norms, Reader

Weigh = Callable[[str, Tensor], Tensor]

ACTIVE: list[Watch] = []  # not a context variable: checkpointed layers run again in autograd's own threads


def watching() -> Watch | None:
    """The watch of this process whose forward or backward is running, if any."""
    return ACTIVE[-1] if ACTIVE else None


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """`F.linear` in the dtype of x, for layers that compute with parameters which are no layer of their own: a watch
    knows it.

    Args:
        x: [..., n]. W: [m, n]. b: [m].
    """
    watch = watching()
    if watch is not None and torch.is_grad_enabled():
        return watched_linear(watch, x, W, b, "a linear map")
    return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))


def vectors(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    """x and vectors that meet it element by element, for such layers: a watch tells their examples apart.

    Args:
        x: [..., n]. params: [n] or [1] each.

    Returns:
        x and the vectors, to be used in their stead; with the values they have.
    """
    watch = watching()
    if watch is None or not torch.is_grad_enabled():
        return (x, *params)
    x = watch.rowwise(x, "a vector", flat=False)
    return (x, *(spread(watch, p, x) for p in params))


class Use:
    """One use of a parameter in a forward; its backward tells it what arises there.

    Attributes:
        name: the parameter's.
        ids: of an embedding, the tokens, any shape.
        head: of an embedding that is also the head, see `Rows.head`.
    """

    def __init__(self, watch: Watch, name: str, ids: Tensor | None = None) -> None:
        self.watch, self.name = watch, name
        self.ids = torch.empty(0) if ids is None else ids
        self.head: Tensor | None = None

    @property
    def spans(self) -> Spans:
        """Of an embedding's tokens."""
        return self.watch.layout.spans(self.ids.numel())

    def outer(self, A: Tensor, G: Tensor) -> None:
        """A linear layer's inputs A [..., n] and output gradients G [..., m], of all rows' tokens in order."""
        A, G = (t.reshape(-1, t.shape[-1]) for t in (A, G))
        if self.watch.weighted:  # sums that are weighted by norms must not be rounded more coarsely than those
            dtype = torch.promote_types(A.dtype, self.watch.params[self.name].dtype)
            A, G = A.to(dtype), G.to(dtype)
        self.arrive(Outer((Pair(A, G, self.watch.layout.spans(len(A))),), self.watch.grams))

    def summed(self, G: Tensor) -> None:
        """A bias's: output gradients G [..., m]."""
        G = G.reshape(-1, G.shape[-1])
        self.whole(self.watch.layout.spans(len(G)).sums(G).unsqueeze(1))

    def rows(self, ids: Tensor, D: Tensor) -> None:
        """An embedding's: tokens ids [...] and output gradients D [..., n]."""
        ids, D = ids.flatten(), D.reshape(-1, D.shape[-1])
        number = self.watch.layout.examples
        words = len(self.watch.params[self.name])
        self.arrive(Rows(ids, D, self.spans.owner, words, number, self.head))

    def whole(self, V: Tensor) -> None:
        """[B, m, n]."""
        self.arrive(Whole(V))

    def arrive(self, form: Form) -> None:
        """Any form."""
        self.watch.arrive(self, form)


class Watch:
    """One watched pass. Made by `PerExample.watch`."""

    def __init__(
        self,
        layout: Layout,
        params: Mapping[str, nn.Parameter],
        names: Mapping[int, str],
        layers: Sequence[tuple[str, nn.Module]],
        readers: Sequence[Reader],
        keep: bool,
        weigh: Weigh | None,
        scratch: Scratch,
    ) -> None:
        self.layout, self.params, self.readers = layout, params, readers
        self.keep, self.weigh = keep, weigh
        self._names, self._paths = names, {id(layer): path for path, layer in layers}
        self._rules = {id(layer): rule(layer) for _, layer in layers}
        self.scratch, self.grams = scratch, Grams()
        self._noted: dict[str, int] = {}  # uses in the forward
        self._used: dict[str, int] = {}  # those of them that are still to arrive
        self._silent = False
        self._ids: dict[str, list[Use]] = {}  # those of them that are embeddings
        self._held: dict[str, list[Form]] = {}
        self._done: set[str] = set()
        self._kept: dict[str, Form] = {}

    def begin(self, readers: Sequence[Reader]) -> None:
        """Tell readers that a pass begins."""
        shapes = {name: matrix(p) for name, p in self.params.items()}
        for reader in readers:
            reader.begin(self.layout.examples, shapes, self.scratch.device)

    # What layers ask.

    def run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """A layer's forward."""
        apply: Any = self._rules[id(layer)]
        if not torch.is_grad_enabled():
            plain: Tensor = type(layer).forward(layer, *args, **kwargs)
            return plain
        if kwargs:
            args, kwargs = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs).args[1:], {}
        found: Tensor = apply(self, layer, *args, **kwargs)
        return found

    def use(self, p: Tensor, ids: Tensor | None = None) -> Use | None:
        """Note that the forward uses a parameter; None where it is not watched."""
        if not torch.is_grad_enabled():
            return None
        name = self._names.get(id(p))
        if name is None:
            if p.requires_grad:
                raise InputError(
                    f"per-example gradients: a weight {list(p.shape)} that requires a gradient is none of the trained "
                    "parameters: it is computed from others, or was thawed since the engine was made"
                )
            return None
        use = Use(self, name, ids)
        if torch._C._current_graph_task_id() == -1:  # else a checkpointed layer runs again, whose uses are noted
            self._used[name] = self._noted[name] = self._noted.get(name, 0) + 1
            if ids is not None:
                self._ids.setdefault(name, []).append(use)
        return use

    def embeddings(self, name: str) -> list[Use]:
        """The uses of a weight as an embedding in this forward, so far."""
        return self._ids.get(name, [])

    @property
    def sums_only(self) -> bool:
        """Is all that is asked norms, and the plain sum over examples?"""
        return not self.keep and self.weigh is None and all(isinstance(reader, Norms) for reader in self.readers)

    @property
    def weighted(self) -> bool:
        """Will there be a weighted sum?"""
        return self.keep or self.weigh is not None

    def path(self, layer: nn.Module) -> str:
        """A layer's path."""
        return self._paths[id(layer)]

    def rowwise(self, x: Tensor, name: str, features: int = 1, flat: bool = True) -> Tensor:
        """An input that can be parted into examples; what is common to all rows is repeated for each.

        Args:
            x: the input. name: of the layer. features: axes that are not tokens. flat: may tokens of all rows be one
            axis?

        Raises:
            InputError: it cannot.
        """
        if x.dim() > features and len(x) == 1 and self.layout.rows > 1:
            x = x.expand(self.layout.rows, *x.shape[1:])
        shape = x.shape if flat else torch.Size((*x.shape[:2], 0, 0))[: max(x.dim(), 3)]
        if x.dim() <= features or not self.layout.fits(shape):
            raise InputError(
                f"per-example gradients: {name} gets an input of shape {list(x.shape)}, in which the "
                f"{self.layout.rows} rows cannot be told apart"
            )
        return x

    def rows_only(self, x: Tensor, name: str) -> Tensor:
        """An input [R, ...] whose other axes are not tokens.

        Raises:
            InputError: it is not, or the batch is packed.
        """
        if self.layout.packed is not None:
            raise InputError(f"per-example gradients: {name} mixes the tokens of a row, so rows cannot be packed")
        return self.rowwise(x, name, flat=False)

    def again(self, *readers: Reader) -> None:
        """Begin another backward of the same forward, such as that of one term, for other readers. It needs what the
        one before keeps with ``retain_graph=True``, and leaves `.grad` alone."""
        if self.keep:
            raise InputError("per-example gradients that are kept are those of one backward")
        self.settle()
        self.begin(readers)
        self.readers, self.weigh, self._used, self._silent = readers, None, dict(self._noted), True
        self._done.clear()

    # What becomes of what they tell.

    def arrive(self, use: Use, form: Form) -> None:
        """A use's gradients are there; those of a parameter used once are settled at once."""
        name = use.name
        if self._used.get(name, 0) < 1:
            raise InputError(
                f"per-example gradients: {name!r} gets a gradient from a forward that was not watched; run one forward "
                "and one backward inside the watch, and checkpoint with use_reentrant=False"
            )
        self._used[name] -= 1
        self._held.setdefault(name, []).append(form)
        if self._used[name] == 0:
            self._settle(name)

    def settle(self) -> None:
        """Settle the parameters of which some uses got no gradient."""
        for name in [*self._held]:
            self._settle(name)

    @torch.no_grad()
    def _settle(self, name: str) -> None:
        try:
            form: Any = join(self._held.pop(name))
        except InputError as error:
            raise InputError(f"per-example gradients: {name!r}: {error}") from None
        if name in self._done:
            raise InputError(f"per-example gradients: {name!r} got gradients twice; run one backward inside the watch")
        self._done.add(name)
        if self.keep:
            self._kept[name] = form = form.kept()
            self._read(name, form)
        elif self.weigh is not None:
            form = form.kept()
            self._read(name, form)
            self._into(name, form.total(self.weigh(name, form.squared(bound=True))))
        elif isinstance(form, Outer) and not (form.gram_pays and self.sums_only):
            total = form.pairs[0].A.new_empty(form.shape)
            for rows, block in blocks(form, self.layout.examples, form.dtype, self.scratch):
                for reader in self.readers:
                    reader.take(name, rows, block)
                torch.sum(block, 0, out=total[rows])
            self._into(name, total)
        else:
            self._read(name, form)
            self._into(name, form.total(None))

    def _read(self, name: str, form: Any) -> None:
        """Tell the readers; norms come from whatever is fastest."""
        others = []
        for reader in self.readers:
            if isinstance(reader, Norms):
                reader.squared[name] = form.squared(reader.bound)
            else:
                others.append(reader)
        if others:
            for rows, block in blocks(form, self.layout.examples, form.dtype, self.scratch):
                for reader in others:
                    reader.take(name, rows, block)

    def _into(self, name: str, total: Tensor) -> None:
        """Add to `.grad`."""
        if self._silent:
            return
        p = self.params[name]
        total = total.view(p.shape).to(p.dtype)
        p.grad = total if p.grad is None else p.grad.add_(total)

    @torch.no_grad()
    def add(self, weight: Tensor | Mapping[str, Tensor]) -> None:
        """`.grad` += Σ_b weight_b g_b, once, after a watch that kept.

        Args:
            weight: [B], or parameter → [B].
        """
        if not self.keep:
            raise InputError("nothing was kept to add up: watch with keep=True, and add once")
        self.keep = False
        while self._kept:
            name, form = self._kept.popitem()
            self._into(name, form.total(weight[name] if isinstance(weight, Mapping) else weight))

    def bypassed(self, name: str, grad: Tensor | None) -> None:
        """Autograd itself forms a gradient of a watched parameter; None is what its layer returns."""
        if grad is not None:
            raise InputError(
                f"per-example gradients: {name!r} is used outside its layer's forward, where its examples cannot be "
                "told apart"
            )
