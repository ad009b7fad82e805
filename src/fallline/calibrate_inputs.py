"""In which directions the inputs of a model's layers vary, on some data, before it is trained.

Principal components, batch by batch. Of N tokens before there are the mean x̄ [n], the k leading directions V [k, n]
with their singular values S, and the sum q of squares about the mean; a batch X [t, n] with mean x̄_b makes of them

    [diag(S) V;  X − x̄_b;  √(N t / (N + t)) (x̄ − x̄_b)] = U S' V'     the k leading triples are kept
    q' = q + ‖X − x̄_b‖² + N t / (N + t) ‖x̄ − x̄_b‖²                   S'² / q' is the explained share of the variance

which is exact when nothing but zeros is dropped, and else forgets what lay outside V. Layers with the same input share
one V. A forward shows the layers' inputs one after another: beside the V's, k n numbers each, room is needed for one of
them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .calibrate import Batch, Data, low_rank, wide
from .errors import InputError


class Directions:
    """The leading principal directions of rows that come in batches; see the module docstring.

    Args:
        count: k, the most to keep. tau: a direction is steady when a batch turns it by no more than arccos τ.
        noise: for decompositions that are not exact; draws on the CPU.

    Attributes:
        seen: N. mean: x̄ [n] and spread: q [], both in float64.
        S: [k] in descending order. V: [k, n] orthonormal, in each row the largest entry is positive.
        steady: [k] bool.
    """

    mean: Tensor
    spread: Tensor
    S: Tensor
    V: Tensor

    def __init__(self, count: int, tau: float, noise: torch.Generator) -> None:
        self.count, self.tau, self.noise = count, tau, noise
        self.seen = 0
        self.steady = torch.zeros(count, dtype=torch.bool)

    def add(self, X: Tensor) -> None:
        """Rows [t, n], at least one."""
        N, t = self.seen, len(X)
        X = X.to(wide(X))
        mean = X.mean(0, dtype=torch.float64)
        rows = X - mean.to(X.dtype)
        spread = rows.square().sum(dtype=torch.float64)
        before = self.V if N else X[:0]
        if N:
            apart = self.mean - mean
            shift = math.sqrt(N * t / (N + t)) * apart
            rows = torch.cat((self.S[:, None] * self.V, rows, shift.to(X.dtype)[None]))
            spread += self.spread + shift.square().sum()
            mean += N / (N + t) * apart
        _, self.S, V = low_rank(rows, self.count, self.noise)
        signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
        self.V = (V * signs).t().contiguous()
        self.seen, self.mean, self.spread = N + t, mean, spread
        self.steady = torch.zeros(self.count, dtype=torch.bool, device=X.device)
        self.steady[: len(before)] = (self.V[: len(before)] * before).sum(1).abs() >= self.tau

    def shares(self) -> Tensor:
        """What part of the variance each direction explains, [k] in float64; zeros where there is no variance."""
        return self.S.double().square() / self.spread.clamp(min=torch.finfo(torch.float64).tiny)


def directions(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    data: Data,
    *,
    count: int,
    budget: int,
    tau: float,
    noise: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The `budget` directions of all layers' inputs that explain the largest shares of their input's variance.

    Only the tokens of `data.counted` are looked at. After each batch the budget is dealt out anew, and a layer is left
    alone for as long as those of its directions that it would get are steady; when all are, or the data end, that is
    the result.

    Args:
        model: in the mode in which it shall run.
        layers: path → layer of the model that takes its input as its first argument, in forward order.
        data: to look at, each batch at most once; the first one that counts is run once more.
        count: k, the most directions of a layer.
        budget: directions of all layers together.
        tau: see `Directions`.
        noise: path → see `Directions`.

    Returns:
        Path → [r, n], r ≤ k and possibly 0.

    Raises:
        InputError: no data, or too little; a loss that is not finite; a layer that does not run, or does not see the
            tokens of the batch.
    """
    groups: dict[str, list[str]] = {}  # the first layer that has an input → all that have it
    found: dict[str, Directions] = {}
    ranks = dict.fromkeys(layers, count)
    for batch in data.batches():
        keep = data.counted(batch)
        if keep is not None and not keep.any():
            continue
        run = partial(checked, data, batch)
        if not groups:
            groups = same_inputs(layers, run)
            found = {path: Directions(count, tau, noise(path)) for path in groups}
        needed = {path: max(ranks[each] for each in group) for path, group in groups.items()}
        moving = {path: each for path, each in found.items() if not each.steady[: needed[path]].all()}
        if not moving:
            break
        with seeing({path: layers[path] for path in moving}, partial(add, moving, keep)):
            run()
        shares = {path: found[first].shares() for first, group in groups.items() for path in group}
        ranks = allocate({path: shares[path] for path in layers}, budget)
    if not groups:
        raise InputError("there is no data to begin from, or no token of it is a label")
    few = max(each.seen for each in found.values())  # some were done early
    if few <= count:
        raise InputError(
            f"{count} directions cannot be told from {few} tokens, which are all that the data to begin from have "
            "before labels; give more data, or take a smaller 'rank'"
        )
    return {path: found[first].V[: ranks[path]] for first, group in groups.items() for path in group}


def allocate(scores: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of each layer's scores, which descend, are among the `budget` best of all; of equal ones the first."""
    owners = [path for path, each in scores.items() for _ in each]
    best = torch.cat([each.cpu() for each in scores.values()]).argsort(descending=True, stable=True)[:budget]
    counts = Counter(owners[i] for i in best.tolist())
    return {path: counts[path] for path in scores}


def same_inputs(layers: Mapping[str, nn.Module], run: Callable[[], None]) -> dict[str, list[str]]:
    """The first layer that has an input → all layers that have it: the same tensors, in the same order.

    Raises:
        InputError: a layer does not run.
    """
    numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a tensor that is gone is not mistaken for its successor
    seen: dict[str, list[int]] = {path: [] for path in layers}
    given = iter(range(2**62))

    def see(path: str, x: Tensor) -> None:
        if x not in numbers:
            numbers[x] = next(given)
        seen[path].append(numbers[x])

    with seeing(layers, see):
        run()
    groups: dict[tuple[int, ...], list[str]] = {}
    for path, inputs in seen.items():
        if not inputs:
            raise InputError(f"{path} does not run on the data to begin from; leave it out of 'targets'")
        groups.setdefault(tuple(inputs), []).append(path)
    return {group[0]: group for group in groups.values()}


@contextmanager
def seeing(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `see` is told of each layer's inputs, and nothing is compiled: compiled code does not know of hooks."""
    hooks = []
    try:
        for path, layer in layers.items():
            hooks.append(layer.register_forward_pre_hook(partial(told, see, path)))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def add(found: Mapping[str, Directions], keep: Tensor | None, path: str, x: Tensor) -> None:
    """The tokens of a layer's input that count, to its directions."""
    found[path].add(tokens(x, keep, path))


def told(see: Callable[[str, Tensor], None], path: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A hook before a layer's forward."""
    see(path, args[0])


def checked(data: Data, batch: Batch) -> None:
    """Run the model on a batch.

    Raises:
        InputError: the loss is not finite.
    """
    loss = data.loss(batch)
    if not loss.isfinite():
        raise InputError(f"the loss on the data to begin from is {loss.item()}; look at model and data")


def tokens(x: Tensor, keep: Tensor | None, path: str) -> Tensor:
    """Those rows of a layer's input [..., n] that count, [t, n]."""
    rows = x.reshape(-1, x.shape[-1])
    if keep is None:
        return rows
    if keep.numel() != len(rows):
        raise InputError(
            f"{path} sees an input of {list(x.shape)}, which is not one of the {list(keep.shape)} tokens of the data; "
            "leave it out of 'targets'"
        )
    return rows[keep.flatten()]
