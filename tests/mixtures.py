"""Small mixtures of experts as 🤗 Transformers builds them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

KINDS: dict[str, dict[str, Any]] = {
    "Qwen2Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 8,
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},  # biases, transposed stacks
    "Glm4Moe": {  # sigmoid
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0,
    },
}  # fmt: skip


def mixture(
    kind: str = "Qwen2Moe", words: int = 40, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any
) -> Any:
    """Two layers of four experts. In float64 only the plain loop over experts runs."""
    torch.manual_seed(seed)
    size = {
        "vocab_size": words, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 512,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**size | KINDS[kind] | more)
    how = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, **how).to(dtype)
    with torch.no_grad():
        for p in model.parameters():  # so that answers and gates differ much
            p.mul_(3)
    return model
