"""What a causal language model says of each label, for evaluation: −log p, and whether it is the model's first choice.

An answer whose every label is the first choice is the one that greedy decoding would write, to the letter: up to a
label that is not, both see the same tokens. So an exact match needs one forward and no generation.

Nothing here has a gradient, and logits never exist for more than a chunk of tokens, see `tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .cross_entropy import nll
from .tokens import of_labels


def scores(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(z)_y, and 1 where z_y is the greatest (of equal ones the first), else 0.

    Args:
        logits: [N, V], may be overwritten. labels: [N] int64, 0 … V − 1.

    Returns:
        [2, N], float32, or float64 for float64 logits.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    first = z.argmax(1) == labels
    return torch.stack([nll(z, labels.unsqueeze(1), slope=False)[0], first.to(z.dtype)])


def token_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """`scores` of every label of a batch, [2, R, L]; 0 where the label is −100. See `tokens.of_labels`."""
    return of_labels(model, batch, scores)
