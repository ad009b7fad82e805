"""Small real models for the adapters' tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

WORDS = 64


def llama(dtype: torch.dtype = torch.float32, tied: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0  # dropout would hide differences
    return model


def tokens(rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(1))


def fit(model: Any, steps: int = 5, lr: float = 2e-2) -> None:
    """Train what can be trained, so that ΔW is clearly not zero."""
    ids = tokens()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    model.eval()
    return model(input_ids=tokens()).logits


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def stop_at(step: int) -> Callable[[Mapping[str, Any]], str]:
    """What `train` is watched by so that it dies at a step as if killed: nothing is saved on the way out."""

    def watch(record: Mapping[str, Any]) -> str:
        if record["step"] == step:
            raise KeyboardInterrupt
        return ""

    return watch
