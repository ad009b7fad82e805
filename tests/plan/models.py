"""Small models of several architectures, as configurations."""

from __future__ import annotations

from transformers import Gemma2Config, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

SIZE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 300}


def config(name: str, layers: int = 6) -> PretrainedConfig:
    more = SIZE | {"num_hidden_layers": layers}
    match name:
        case "llama":
            return LlamaConfig(**more, tie_word_embeddings=False)
        case "qwen2":
            return Qwen2Config(**more, num_key_value_heads=2, tie_word_embeddings=True)
        case "gemma2":  # every second layer has a window
            return Gemma2Config(**more, num_key_value_heads=2, head_dim=16)
        case _:
            return GPT2Config(n_embd=64, n_layer=layers, n_head=4, vocab_size=300)
