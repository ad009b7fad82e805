"""Token losses of a language model, and tokens summed into examples.

Shapes: B examples, R rows of L tokens (R = B unless rows are packed). Labels are already shifted: ``labels[t]`` is what
position t must predict, −100 where nothing is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextvars import Context
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cross_entropy import (
    IGNORED,
    TokenLoss,
    chunk_size,
    full_cross_entropy,
    linear_cross_entropy,
    twice_differentiable,
)
from .isolation import isolated

__all__ = [
    "IGNORED",
    "TokenLoss",
    "chunk_size",
    "full_cross_entropy",
    "label_counts",
    "linear_cross_entropy",
    "linear_of_labels",
    "mean_losses",
    "of_labels",
    "per_example",
    "per_token",
    "plain_head",
    "token_losses",
    "token_losses_and_hidden",
    "twice_differentiable",
]

_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # not an attribute: verdicts stay out of the model


def token_losses(
    model: nn.Module, batch: Mapping[str, Tensor], share: Tensor | None = None, rule: TokenLoss | None = None
) -> Tensor:
    """−log p of every label of a batch under a causal language model; 0 where the label is −100.

    Full logits exist only for a model that changes them after the head (a cap, a scale), which is found out once per
    model and logged, and inside `twice_differentiable`.

    Args:
        model: a 🤗 causal language model.
        batch: `input_ids` and `labels` [R, L], and what `isolated` reads.
        share: [R, L], see `linear_cross_entropy`.
        rule: another function of the logits in place of −log p.

    Returns:
        [R, L], float32 or float64.
    """
    if not plain_head(model, batch["labels"].device):
        return full_cross_entropy(model(**isolated(model, batch)).logits, batch["labels"], rule)
    return _through_head(model, batch, share, rule)[0]


def token_losses_and_hidden(
    model: nn.Module, batch: Mapping[str, Tensor], share: Tensor | None = None, rule: TokenLoss | None = None
) -> tuple[Tensor, Tensor]:
    """`token_losses`, and what the head reads, [R, L, D]."""
    if plain_head(model, batch["labels"].device):
        return _through_head(model, batch, share, rule)
    seen: list[Tensor] = []
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    with head.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        logits = model(**isolated(model, batch)).logits
    return full_cross_entropy(logits, batch["labels"], rule), seen[-1]


def _through_head(
    model: nn.Module, batch: Mapping[str, Tensor], share: Tensor | None, rule: TokenLoss | None
) -> tuple[Tensor, Tensor]:
    """Values, and hidden states, of a model with a plain head."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    hidden = model.get_decoder()(**isolated(model, batch)).last_hidden_state  # type: ignore[operator]
    return linear_cross_entropy(hidden, head.weight, batch["labels"], bias=head.bias, share=share, rule=rule), hidden


@torch.no_grad()
def of_labels(model: nn.Module, batch: Mapping[str, Tensor], rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A function of every label and its logits, without gradient; 0 where the label is −100.

    Full logits exist only for a model that changes them after the head, as with `token_losses`.

    Args:
        model: a 🤗 causal language model.
        batch: `input_ids` and `labels` [R, L], and what `isolated` reads.
        rule: of logits [c, V], which it may overwrite, and labels [c]; gives [..., c].

    Returns:
        [..., R, L].
    """
    inputs, labels = isolated(model, batch), batch["labels"]
    if plain_head(model, labels.device):
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        hidden = model.get_decoder()(**inputs).last_hidden_state  # type: ignore[operator]
        return linear_of_labels(hidden, head.weight, labels, rule, bias=head.bias)
    asked = labels.flatten() != IGNORED
    return spread(rule(model(**inputs).logits.flatten(0, -2)[asked], labels.flatten()[asked]), labels)


@torch.no_grad()
def linear_of_labels(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rule: Callable[[Tensor, Tensor], Tensor],
    *,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """`of_labels` for the logits weight · hidden + bias, in chunks of tokens.

    Costs 2 N V D floating-point operations and what `rule` needs for one chunk's logits.

    Args:
        hidden: [..., D]. weight: [V, D]. bias: [V]. labels: [...] int64. rule: see `of_labels`.
        chunk: tokens in a chunk; None lets `chunk_size` choose.
    """
    y = labels.flatten()
    asked = (y != IGNORED).nonzero().squeeze(1)
    h, size = hidden.flatten(0, -2), chunk or chunk_size(len(asked), len(weight), hidden.device.type)
    found = [rule(F.linear(h[part], weight, bias), y[part]) for part in asked.split(size)]
    return spread(torch.cat(found, -1), labels)


def spread(values: Tensor, labels: Tensor) -> Tensor:
    """Values [..., c] of the labels [R, L] that are not −100, in order, where they belong: [..., R, L], 0 elsewhere."""
    whole = values.new_zeros(*values.shape[:-1], labels.numel())
    whole[..., labels.flatten() != IGNORED] = values
    return whole.view(*values.shape[:-1], *labels.shape)


def mean_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Each example's mean −log p per label under a causal language model; 0 for an example without a label.

    Args:
        model: a 🤗 causal language model.
        batch: `labels` [R, L], and what `token_losses` and `per_example` read.

    Returns:
        [B] nats, float64.
    """
    each = 1 / label_counts(batch).clamp(min=1).double()
    return per_example(token_losses(model, batch, per_token(each, batch)).double(), batch) * each


def label_counts(batch: Mapping[str, Tensor]) -> Tensor:
    """How many labels each example has, [B] int64."""
    return per_example((batch["labels"] != IGNORED).long(), batch)


def plain_head(model: nn.Module, device: torch.device) -> bool:
    """Are the model's logits a plain linear map of what its decoder returns? Tried once per model, then remembered."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear:  # or it has an adapter now, which may be taken off again
        return False
    if model not in _PLAIN:
        # a context of its own: what blocks tell the step while they run must not come from this forward
        _PLAIN[model] = Context().run(_probe, model, head, device)
        if not _PLAIN[model]:
            logging.getLogger("fallline").warning(
                "%s: logits are not a plain linear map of the decoder's output; the loss forms full logits",
                type(model).__name__,
            )
    # a hook that came later changes what the head answers
    return _PLAIN[model] and not head._forward_hooks and not head._forward_pre_hooks


def assume_plain_head(model: nn.Module, plain: bool) -> None:
    """Settle `plain_head` for a model that has no values to try it on."""
    _PLAIN[model] = plain


@torch.no_grad()
def _probe(model: Any, head: nn.Linear, device: torch.device) -> bool:
    """Run the model on a few tokens with the head's answer replaced by numbers that any cap or scale would change."""
    if not hasattr(model, "get_decoder"):
        return False
    ids = torch.arange(min(8, head.out_features), device=device).unsqueeze(0)
    seen: dict[str, Tensor] = {}

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        line = torch.linspace(-100, 100, output.numel(), device=output.device)
        seen.update(hidden=args[0], logits=line.to(output.dtype).view_as(output))
        return seen["logits"]

    def run(module: nn.Module) -> Any:
        torch.manual_seed(0)  # the same dropout twice
        return module(input_ids=ids, use_cache=False)

    eager = torch.compiler.set_stance("force_eager")  # nothing to compile for so few tokens
    with eager, torch.random.fork_rng([device] if device.type == "cuda" else []):
        with head.register_forward_hook(replace):
            logits = run(model).logits
        hidden = getattr(run(model.get_decoder()), "last_hidden_state", None)
    return (
        bool(seen)
        and hidden is not None
        and bool(hidden.any())
        and torch.equal(hidden, seen["hidden"])
        and torch.equal(logits.to(seen["logits"].dtype), seen["logits"])
    )


def per_example(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Token values summed into examples.

    Args:
        values: [R, L], any number type.
        batch: `example_id` [B]; `segment` [R, L] when packed, whose −1 is nobody's.

    Returns:
        [B], of the type of `values`.
    """
    if "segment" not in batch:
        return values.sum(1, dtype=values.dtype)
    sums = values.new_zeros(len(batch["example_id"]) + 1)
    return sums.index_add(0, batch["segment"].flatten() + 1, values.flatten())[1:]


def per_token(values: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Each token's example's value, the transpose of `per_example`.

    Args:
        values: [B].
        batch: `input_ids` [R, L]; `segment` [R, L] when packed, whose −1 gets 0.

    Returns:
        [R, L].
    """
    if "segment" not in batch:
        return values.unsqueeze(1).expand(batch["input_ids"].shape)
    segment = batch["segment"]
    return values[segment.clamp(min=0)].masked_fill(segment < 0, 0)
