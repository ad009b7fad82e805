"""Llama, trained from scratch, in sizes from 1 M to 7 B parameters.

`60m` … `7b` are the shapes of GaLore and of the papers that compare with it (jiaweizzhao/GaLore,
configs/llama_*.json), which name them by their size with 32 000 words; `tiny` has the proportions of its llama_9m. The
vocabulary is the tokenizer's. With D hidden, F intermediate size, N layers and V words the model has

    N·(4 D² + 3 D F + 2 D) + D + 2 V D        parameters (V D fewer when tied).

Weights start as 🤗 Transformers starts them: every matrix from N(0, 0.02²), norms at 1. But each is drawn from its own
stream, so that a model depends on the seed and its shape alone: not on the order of parameters, the device or on what
was drawn before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from ..catalog import Card
from ..noise import rng
from ..options import option
from .base import ModelOptions, finish

CARD = Card(
    id="llama",
    kind="model",
    summary="Llama from scratch in seven sizes, from tiny (1 M parameters) to 7b.",
    paper="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    year=2024,
    repository="jiaweizzhao/GaLore",
    flops="6 per parameter and token forward and backward, 8 with checkpointing; attention comes on top",
    checked="rotary tables against 🤗 Transformers; seeded weights; documents in a row bit-isolated",
    departures="documents in a row are isolated, in GaLore's scripts they are padded to a row each",
    tags=("llama", "causal language model", "pre-training", "from scratch", "preset"),
)

#: Preset → hidden size D, intermediate size F, layers N, attention heads.
PRESETS = {
    "tiny": (128, 352, 4, 4),
    "small": (320, 864, 6, 5),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "7b": (4096, 11008, 32, 32),
}
STD = 0.02
LEAST_POSITIONS = 1024  # rotary positions cost nothing; room to generate beyond short training rows


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """Which size, and whether input and output embeddings are one."""

    brings_tokenizer: ClassVar[bool] = False

    preset: Literal["tiny", "small", "60m", "130m", "350m", "1b", "7b"] = option(
        help="size; tiny has 1.3 M parameters with 2048 words, small 10 M with 4096, the others theirs with 32 000"
    )
    tied: bool = option(False, "the head is the embedding, transposed", source="GaLore's configs: untied")


def tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """None: the tokenizer is the data's."""
    return None


def architecture(config: Config, tokenizer: PreTrainedTokenizerBase, length: int) -> LlamaConfig:
    """The 🤗 configuration.

    Positions: `length`, but at least 1024. No padding token: 🤗 would not train its embedding, and it is often the
    token that ends a document.
    """
    return shape(
        config.preset,
        len(tokenizer),
        max_position_embeddings=max(length, LEAST_POSITIONS),
        tie_word_embeddings=config.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


def shape(preset: str, words: int, **more: Any) -> LlamaConfig:
    """The 🤗 configuration of a preset with so many words; `more` goes into it as it is."""
    hidden, intermediate, layers, heads = PRESETS[preset]
    return LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        initializer_range=STD,
        **more,
    )


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter from the stream ``init/NAME``: matrices from N(0, 0.02²), norms 1.

    Drawn in float32 on the CPU, then rounded and moved, one at a time: the same weights on every device.
    """
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(1)
        else:
            p.copy_(torch.empty(p.shape).normal_(0, STD, generator=rng(seed, 0, f"init/{name}")))


def build(
    config: Config,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """A fresh model on `device`, without a draw from the global generator.

    Args:
        config: which.
        tokenizer: says how many words.
        length: of the rows it will be trained on.
        seed: of the run.
        dtype: of the parameters.
        device: where they live.
    """
    with device, no_init_weights():
        told = architecture(config, tokenizer, length)
        model = AutoModelForCausalLM.from_config(told, dtype=dtype, attn_implementation=config.attention)
    model.tie_weights()
    initialise(model, seed)
    return finish(model, config)
