"""Whole sequences: how many labels each has, and its log-probability.

An example may hold several sequences, such as the chosen and the rejected answer to a prompt, one after another in its
row: `side` [R, L] says which sequence 0 … K − 1 of its example a token belongs to, −1 for padding. Each begins at
position 0, so that none sees the other. Without `side` an example is one sequence.

    logp[b, k] = Σ_{t ∈ sequence k of example b} log p(label_t | tokens up to t of the sequence)

Whoever asks what each sequence by itself does to the parameters overhears these on their way into a loss (`overheard`,
`slopes`), and has the per-example engine see sequences in place of examples (`apart`).

Shapes as in `tokens`: B examples of K sequences, R rows of L tokens (R = B unless rows are packed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .errors import InputError
from .tokens import IGNORED, token_losses

_OVERHEARD: ContextVar[list[Tensor] | None] = ContextVar("overheard", default=None)


def sequence_logps(model: nn.Module, batch: Mapping[str, Tensor], sequences: int = 2) -> Tensor:
    """log p of the labels of each sequence under a causal language model; 0 for a sequence without a label.

    Full logits never exist, see `token_losses`. Since nobody can say beforehand what the gradient will be, the backward
    of a trained head computes its logits again: 8 N V D floating-point operations for N labels, V words and hidden size
    D, in place of 6.

    Args:
        model: a 🤗 causal language model.
        batch: `labels` [R, L], what `token_losses` reads, and `side` [R, L] where there are several sequences.
        sequences: K.

    Returns:
        [B, K] nats, summed in float64: of values near −1000 a float32 sum keeps four digits behind the point.
    """
    logp = -per_sequence(token_losses(model, batch).double(), batch, sequences)
    told = _OVERHEARD.get()
    if told is not None:
        told.append(logp)
    return logp


def sequence_counts(batch: Mapping[str, Tensor], sequences: int = 2) -> Tensor:
    """How many labels each sequence has, [B, K] int64."""
    return per_sequence((batch["labels"] != IGNORED).long(), batch, sequences)


def per_sequence(values: Tensor, batch: Mapping[str, Tensor], sequences: int = 2) -> Tensor:
    """Token values summed into sequences.

    Args:
        values: [R, L], any number type.
        batch: `example_id` [B]; `segment` [R, L] when packed; `side` [R, L].
        sequences: K.

    Returns:
        [B, K], of the type of `values`.
    """
    examples, side = len(batch["example_id"]), batch.get("side")
    if "segment" in batch:
        owner = batch["segment"]
    else:
        owner = torch.arange(examples, device=values.device).unsqueeze(1).expand_as(values)
    if side is not None:
        owner = torch.where((owner < 0) | (side < 0), -1, owner * sequences + side)
    else:
        owner = torch.where(owner < 0, -1, owner * sequences)
    sums = values.new_zeros(examples * sequences + 1)  # the first is nobody's
    return sums.index_add(0, owner.flatten() + 1, values.flatten())[1:].view(examples, sequences)


@contextmanager
def overheard() -> Iterator[list[Tensor]]:
    """Inside, what `sequence_logps` answers is also put into this list, with its graph."""
    told: list[Tensor] = []
    token = _OVERHEARD.set(told)
    try:
        yield told
    finally:
        _OVERHEARD.reset(token)


def slopes(table: Mapping[str, Tensor], logp: Tensor) -> dict[str, Tensor]:
    """What each term makes of each log-probability: term → [B, K], Σ_b ∂value[term]_b / ∂logp. The graph stays.

    Args:
        table: term → [B], made of logp and of nothing else that is trained.
        logp: [B, K].

    Raises:
        InputError: a term is trained, and not by way of logp.
    """
    found = {}
    for term, value in table.items():
        slope = torch.zeros_like(logp)
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), logp, retain_graph=True, allow_unused=True)
            if slope is None:
                raise InputError(f"the term {term!r} is no function of the log-probabilities of the answers")
        found[term] = slope
    return found


def apart(batch: Mapping[str, Tensor], sequences: int = 2) -> dict[str, Tensor]:
    """The batch for a watch (`fallline.per_example`) to which sequence k of example b is example b K + k.

    Args:
        batch: `example_id` [B], `side` [R, L], and `segment` [R, L] when packed. sequences: K.
    """
    number, side = len(batch["example_id"]), batch["side"]
    rows = torch.arange(len(side), device=side.device).unsqueeze(1)
    segment = torch.where(side < 0, -1, batch.get("segment", rows) * sequences + side)
    return {"example_id": torch.arange(number * sequences), "segment": segment}
