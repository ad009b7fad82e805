"""What a model shows of itself on some data before it is trained: gradients of its weights. Inputs of its layers are in
`calibrate_inputs`.

Nothing changes: neither parameters nor `.grad` nor what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Data:
    """Batches to look at, and what to ask of the model on each.

    Attributes:
        batches: begins the batches anew; it is called once for each pass over them, and gives the same each time.
        loss: runs the model on a batch; the sum over all batches is the loss that is meant.
        counted: of which tokens of a batch the inputs count, bool; None: of all.
    """

    batches: Callable[[], Iterator[Batch]]
    loss: Callable[[Batch], Tensor]
    counted: Callable[[Batch], Tensor | None] = lambda batch: None


def gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], data: Data, room: int
) -> Iterator[tuple[str, Tensor]]:
    """The gradient of each weight, in float32 at least.

    As many weights at a time as `room` has place for, the last ones of the forward first: a pass over the data for each
    such group, whose backward ends at the first weight of it. So the gradients never take more than `room`, or than the
    largest of them.

    Args:
        model: in the mode in which it shall run.
        weights: name → parameter of the model, in forward order.
        data: what the gradient is of.
        room: bytes.

    Yields:
        The name and the gradient, of the parameter's shape.

    Raises:
        InputError: there is no batch, or a loss that is not finite.
    """
    for group in reversed(list(grouped(weights, room))):
        with only(model, group) as found:
            empty = True
            for batch in data.batches():
                empty = False
                loss = data.loss(batch)
                if not loss.isfinite():
                    raise InputError(f"the loss on the data to begin from is {loss.item()}; look at model and data")
                if loss.requires_grad:
                    loss.backward()
            if empty:
                raise InputError("there is no data to begin from")
        for name, p in group.items():
            G = found.pop(name, None)
            yield name, torch.zeros_like(p, dtype=wide(p)) if G is None else G


def grouped(weights: Mapping[str, nn.Parameter], room: int) -> Iterator[dict[str, nn.Parameter]]:
    """Neighbours whose gradients fit into `room` bytes together; one that does not fit is alone."""
    group: dict[str, nn.Parameter] = {}
    size = 0
    for name, p in weights.items():
        needed = p.numel() * wide(p).itemsize
        if group and size + needed > room:
            yield group
            group, size = {}, 0
        group[name] = p
        size += needed
    if group:
        yield group


def wide(p: Tensor) -> torch.dtype:
    """In which gradients of `p` are summed."""
    return torch.promote_types(p.dtype, torch.float32)


@contextmanager
def only(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Inside, these weights have gradients and nothing else has; they are summed in what this yields."""
    found: dict[str, Tensor] = {}

    def taking(name: str) -> Callable[[Tensor], None]:
        def take(p: Tensor) -> None:
            G = p.grad
            assert G is not None
            p.grad = None
            if name in found:
                found[name] += G
            else:
                found[name] = G.to(wide(p))

        return take

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    hooks = []
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for name, p in weights.items():
            p.requires_grad_(True)
            hooks.append(p.register_post_accumulate_grad_hook(taking(name)))
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for p, trained, grad in before:
            p.requires_grad_(trained)
            p.grad = grad


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode: no dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def low_rank(G: Tensor, rank: int, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples of a matrix.

    Exact where the short side is at most `EXACT`; else by subspace iteration on 4 r directions, in float32 at least.

    Args:
        G: [m, n].
        rank: r, how many.
        noise: draws on the CPU.

    Returns:
        U [m, r], S [r] in descending order, V [n, r].
    """
    G = G.to(wide(G))
    if min(G.shape) <= EXACT or 4 * rank >= min(G.shape):
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank].t()
    tall = G if len(G) >= G.shape[1] else G.t()
    Q = torch.randn(tall.shape[1], 4 * rank, generator=noise, dtype=torch.float32).to(G)
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(tall.t() @ torch.linalg.qr(tall @ Q).Q).Q
    Y = torch.linalg.qr(tall @ Q).Q
    U, S, Vh = torch.linalg.svd(Y.t() @ tall, full_matrices=False)
    U, V = Y @ U[:, :rank], Vh[:rank].t()
    return (U, S[:rank], V) if tall is G else (V, S[:rank], U)


EXACT = 256
"""Short side up to which a whole decomposition is taken."""

ITERATIONS = 4
"""LoRA-GA's and PEFT's."""


def shared_weights(model: nn.Module, weights: Sequence[nn.Parameter]) -> str | None:
    """The name of one of these that the model uses under another name too, or None."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return next((names[id(p)][0] for p in weights if len(names.get(id(p), ())) > 1), None)
