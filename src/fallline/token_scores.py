"""What a causal language model says of each label, for evaluation: −log p, and whether it is the model's first choice.

An answer whose every label is the first choice is the one that greedy decoding would write, to the letter: up to a
label that is not, both see the same tokens. So an exact match needs one forward and no generation.

Nothing here has a gradient, and logits never exist for more than a chunk of tokens, see `tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cross_entropy import nll
from .isolation import isolated
from .tokens import IGNORED, chunk_size, plain_head


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


@torch.no_grad()
def token_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """`scores` of every label of a batch; 0 where the label is −100.

    Args:
        model: a 🤗 causal language model.
        batch: `input_ids` and `labels` [R, L], and what `isolated` reads.

    Returns:
        [2, R, L], float32 or float64.
    """
    inputs, labels = isolated(model, batch), batch["labels"].flatten()
    asked = (labels != IGNORED).nonzero().squeeze(1)
    if plain_head(model, labels.device):
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        hidden = model.get_decoder()(**inputs).last_hidden_state.flatten(0, -2)[asked]  # type: ignore[operator]
        size = chunk_size(len(asked), len(head.weight), labels.device.type)
        chunks = zip(hidden.split(size), labels[asked].split(size), strict=True)
        found = [scores(F.linear(h, head.weight, head.bias), y) for h, y in chunks]
    else:
        found = [scores(model(**inputs).logits.flatten(0, -2)[asked], labels[asked])]
    told = torch.cat(found, 1)
    return told.new_zeros(2, len(labels)).index_copy(1, asked, told).view(2, *batch["labels"].shape)
