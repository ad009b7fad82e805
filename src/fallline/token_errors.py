"""EL2N of tokens: how far what a language model says of a token is from what came, ‖softmax(z) − e_y‖₂.

    EL2N² = Σ_v (p_v − [v = y])² = 1 − 2 p_y + Σ_v p_v² = 1 − 2 p_y + exp(LSE(2z) − 2 LSE(z)),   0 ≤ EL2N ≤ √2

It is computed by the first form: the others lose all digits where the model is right, p_y → 1. Like the losses of
`tokens` it never holds the logits of more than a chunk of tokens. Nothing here has a gradient.

Shapes as in `tokens`: R rows of L tokens, N tokens, D hidden size, V words; a label −100 is not scored.

Source: Paul, Ganguli and Dziugaite, Deep Learning on a Data Diet, 2021, definition 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .tokens import of_labels


def error_norms(logits: Tensor, labels: Tensor) -> Tensor:
    """‖softmax(z) − e_y‖₂ of each row of logits.

    Args:
        logits: [N, V]. labels: [N] int64, 0 … V − 1.

    Returns:
        [N], float32, or float64 for float64 logits.
    """
    p = torch.softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return p.scatter_add_(1, labels.unsqueeze(1), p.new_full((len(p), 1), -1)).norm(dim=1)


def token_errors(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """EL2N of every label of a batch under a causal language model; 0 where the label is −100.

    Full logits exist only for a model that changes them after the head, as with `tokens.token_losses`.

    Args:
        model: a 🤗 causal language model.
        batch: `input_ids` and `labels` [R, L], and what `isolated` reads.

    Returns:
        [R, L], float32 or float64.
    """
    return of_labels(model, batch, error_norms)
