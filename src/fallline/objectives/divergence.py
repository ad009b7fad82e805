"""Keep what a reference says: of some tokens KL(π_ref ‖ π), of the others −log p, from one pass over the head.

    KL = Σ_v p_ref,v (log p_ref,v − log p_v),   ∂KL/∂z = p − p_ref

Both are functions of the logits of one token, hence a `TokenLoss`: a chunk of tokens at a time, with the gradient
formed while the chunk is there. What is held of the reference is what its head reads, D numbers a token; its logits are
made chunk by chunk too. The labels that the head is given are places in the batch, from which label and reference
follow.

Cost: a forward of the decoder of the reference, without gradient, of the rows with such tokens; 2 N V D floating-point
operations for its head, for N such tokens, and as many again where the gradient is not formed in the forward; and the
memory of three more chunks of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..isolation import isolated
from ..reference import Reference
from ..tokens import IGNORED, plain_head


class Towards:
    """See the module docstring; a `TokenLoss` of places.

    Args:
        labels: [P] int64, of each place.
        which: [P] int64, which row of `said` is of each place; −1: −log p of the label is asked there.
        said: [n, D], what the reference's head reads; or, with weight None, its logits [n, V].
        weight, bias: of that head.
    """

    def __init__(self, labels: Tensor, which: Tensor, said: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.labels, self.which, self.said, self.weight, self.bias = labels, which, said, weight, bias

    def __call__(self, z: Tensor, y: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        label, rows, log_ref = self._asked(z, y)
        logp = z.log_softmax(1)
        value = -logp.gather(1, label).squeeze(1)
        value[rows] = (log_ref.exp() * (log_ref - logp[rows])).sum(1)
        if not slope:
            return value, None
        kept = logp[rows].exp_().sub_(log_ref.exp())
        gradient = logp.exp_().scatter_add_(1, label, logp.new_full(label.shape, -1))
        gradient[rows] = kept
        return value, gradient

    def plain(self, z: Tensor, y: Tensor) -> Tensor:
        label, rows, log_ref = self._asked(z, y)
        logp = z.log_softmax(1)
        found = (log_ref.exp() * (log_ref - logp.index_select(0, rows))).sum(1)
        return (-logp.gather(1, label).squeeze(1)).index_copy(0, rows, found)

    def _asked(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels [c, 1]; which rows of the chunk are kept, and log p_ref there [rows, V]."""
        label, which = self.labels[y], self.which[y.squeeze(1)]
        rows = (which >= 0).nonzero().squeeze(1)
        said = self.said[which[rows]]
        logits = said if self.weight is None else F.linear(said, self.weight, self.bias)
        return label, rows, logits.to(z.dtype).log_softmax(1)


@torch.no_grad()
def towards(reference: Reference, batch: Mapping[str, Tensor], asked: Tensor, kept: Tensor) -> tuple[Towards, Tensor]:
    """The rule for a batch, and the labels to give the head.

    Args:
        reference: what is to be kept.
        batch: `input_ids` [R, L], and what `isolated` reads.
        asked: [R, L] labels, −100 where nothing is asked.
        kept: [R, L] bool, where the divergence is asked.

    Returns:
        The rule; [R, L] places.
    """
    where = kept.flatten().nonzero().squeeze(1)
    rows = kept.any(1).nonzero().squeeze(1)
    which = torch.full((kept.numel(),), -1, device=kept.device)
    which[where] = torch.arange(len(where), device=kept.device)
    inputs = {name: batch[name][rows] for name in ("input_ids", "position_ids") if name in batch}
    inner = kept[rows].flatten().nonzero().squeeze(1)
    with reference.model() as model:
        # a context of its own: blocks add no terms to the loss from this forward
        said, weight, bias = Context().run(_says, model, inputs, inner)
    places = torch.arange(kept.numel(), device=kept.device).view_as(asked).masked_fill(asked == IGNORED, IGNORED)
    return Towards(asked.masked_fill(asked == IGNORED, 0).flatten(), which, said, weight, bias), places


def _says(model: nn.Module, inputs: Mapping[str, Tensor], inner: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a model's head reads at some tokens [n, D], with the head; or its logits there [n, V]."""
    owner: Any = model
    head: Any = owner.get_output_embeddings()
    plain = plain_head(model, inner.device)
    if not len(inner):  # no model takes a batch of no rows
        said = torch.zeros(0, head.weight.shape[1 if plain else 0], dtype=owner.dtype, device=inner.device)
    elif plain:
        said = owner.get_decoder()(**isolated(model, inputs)).last_hidden_state.flatten(0, 1)[inner]
    else:
        said = owner(**isolated(model, inputs)).logits.flatten(0, 1)[inner]
    if not plain:
        return said, None, None
    return said, head.weight.detach(), None if head.bias is None else head.bias.detach()
