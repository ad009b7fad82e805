"""Small real models, batches, and the slow truth: one ordinary backward for each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fallline.tokens import IGNORED, per_example, per_token, token_losses

WORDS, LENGTH = 40, 12
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ONE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2} | HEADS


def llama(tied: bool = True, dropout: float = 0.0, **more: Any) -> Any:
    config = LlamaConfig(**ONE, vocab_size=WORDS, tie_word_embeddings=tied, attention_dropout=dropout, **more)
    return LlamaForCausalLM(config)


def qwen3() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**ONE, vocab_size=WORDS, head_dim=4))


def gemma() -> Any:
    return GemmaForCausalLM(GemmaConfig(**ONE, vocab_size=WORDS, head_dim=4))


def gpt2(dropout: float = 0.1) -> Any:
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=32, n_embd=16, n_layer=2, n_head=2, **rates))


LANGUAGE = {
    "llama, tied head": llama,
    "llama, biases": lambda: llama(False, attention_bias=True, mlp_bias=True),
    "qwen3": qwen3,
    "gemma": gemma,
    "gpt2, dropout": gpt2,
}


def made(make: Callable[[], Any], dtype: torch.dtype = torch.float64) -> Any:
    """A model with weights large enough that norms' gains and biases matter."""
    torch.manual_seed(0)
    model = make().to(dtype).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=dtype) * 0.2)
    return model


def rows_batch(rows: int = 5) -> dict[str, Tensor]:
    """Rows with padding, masked labels, and one row without any label."""
    noise = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (rows, LENGTH), generator=noise)
    ids[0, 1:4] = ids[0, 0]  # the same word again and again
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORED
    labels[0, :5] = IGNORED
    labels[1, 7:], ids[1, 8:] = IGNORED, 0
    labels[-1] = IGNORED
    return {
        "input_ids": ids,
        "labels": labels,
        "example_id": torch.arange(rows),
        "weight": torch.linspace(0.5, 2, rows, dtype=torch.float64),
    }


def packed_batch() -> dict[str, Tensor]:
    """Seven pieces of uneven length in three rows, padding at the end of two."""
    noise = torch.Generator().manual_seed(2)
    sizes = [[5, 4, 3], [7, 1], [4, 6]]
    segment = torch.full((3, LENGTH), -1)
    positions = torch.zeros(3, LENGTH, dtype=torch.long)
    labels = torch.full((3, LENGTH), IGNORED)
    ids = torch.randint(1, WORDS, (3, LENGTH), generator=noise)
    b = 0
    for r, row in enumerate(sizes):
        at = 0
        for size in row:
            segment[r, at : at + size] = b
            positions[r, at : at + size] = torch.arange(size)
            labels[r, at : at + size - 1] = ids[r, at + 1 : at + size]
            at, b = at + size, b + 1
        positions[r, at:] = torch.arange(LENGTH - at) + int(positions[r, at - 1]) + 1
    labels[0, 0] = IGNORED
    return {
        "input_ids": ids,
        "labels": labels,
        "segment": segment,
        "position_ids": positions,
        "example_id": torch.arange(b),
        "weight": torch.linspace(0.5, 2, b, dtype=torch.float64),
    }


def losses(model: Any, batch: dict[str, Tensor], early: bool = True) -> Tensor:
    """[B], each example's weighted loss; the same dropout at every call."""
    torch.manual_seed(7)
    share = per_token(batch["weight"], batch) if early else None
    return batch["weight"] * per_example(token_losses(model, batch, share), batch)


def truth(params: dict[str, nn.Parameter], rows: Tensor) -> dict[str, Tensor]:
    """parameter → [B, …], from one backward for each example."""
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    for row in rows:
        grads = torch.autograd.grad(row, list(params.values()), retain_graph=True, materialize_grads=True)
        for name, grad in zip(params, grads, strict=True):
            found[name].append(grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
