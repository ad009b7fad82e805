"""Model FLOPs utilisation: how much of what the machine's matrix products can do goes into training.

    MFU = tokens/s · F / P,   F = (4 N + 2 N') + 12 · layers · width · length

F are the floating-point operations that a token needs forward and backward, N the parameters it is multiplied with and
N' those of them that are trained; the last term is attention's (PaLM, appendix B). What is computed twice, as with
checkpointing, does not count. P is tried out: the fastest of a few large products in the run's dtype.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import nn

from ..quantised import stands_for

SIDE = {"cpu": 1024, "cuda": 8192}
TRIES = 5


def token_flops(model: nn.Module, length: int) -> float:
    """F of a 🤗 causal language model for rows of `length` tokens."""
    owner: Any = model
    text = owner.config.get_text_config()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = owner.get_output_embeddings()
    if head is not None:
        tables.discard(id(head.weight))  # tied: looked up and multiplied with
    multiplied = [p for p in model.parameters() if p.ndim > 1 and id(p) not in tables]
    packed = stands_for(model)
    n = sum(packed.get(id(p), p.numel()) for p in multiplied)
    trained = sum(p.numel() for p in multiplied if p.requires_grad)
    return 4.0 * n + 2.0 * trained + 12.0 * text.num_hidden_layers * text.hidden_size * length


@cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """P, floating-point operations per second; a tenth of a second the first time."""
    side = SIDE.get(device.type, SIDE["cpu"])
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(TRIES):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best
