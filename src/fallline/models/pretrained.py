"""Any causal language model of 🤗 Transformers, by hub id or local folder, with its own tokenizer.

A checkpoint that lacks a tensor is refused. Code that comes with a checkpoint is not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..catalog import Card
from ..options import option
from .base import LoadedOptions
from .loading import configuration, load_model, load_tokenizer

CARD = Card(
    id="pretrained",
    kind="model",
    summary="Any causal language model of 🤗 Transformers, by hub id or local folder, with its tokenizer.",
    needs=("documents in a row can be isolated: tried at every start, recurrent models are refused",),
    flops="6 per parameter and token forward and backward, 8 with checkpointing; attention comes on top",
    checked="Llama, Mistral, Qwen2, Gemma 2 and 3, GPT-2, GPT-NeoX, OPT: documents in a row bit-isolated",
    tags=("causal language model", "fine-tuning", "checkpoint", "hub", "transformers"),
)


@dataclass(frozen=True, kw_only=True)
class Config(LoadedOptions):
    """Which model."""

    brings_tokenizer: ClassVar[bool] = True

    path: str = option(help="a local folder with config.json, weights and tokenizer; or an id of the 🤗 hub")


def tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with the model.

    Raises:
        InputError: no model at `path`, or no tokenizer with it.
    """
    return load_tokenizer(config.path)


def architecture(config: Config, tokenizer: PreTrainedTokenizerBase, length: int) -> PretrainedConfig:
    """The 🤗 configuration.

    Raises:
        InputError: no model at `path`, or not a causal one.
    """
    found: PretrainedConfig = configuration(config.path)
    return found


def build(
    config: Config,
    *,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The model, loaded.

    Args:
        config: which.
        tokenizer: what `tokenizer` gave.
        length: of the rows it will be trained on.
        seed: not used, the weights are given.
        dtype: of the parameters, whatever the checkpoint's.
        device: where they live.

    Raises:
        InputError: no such model, not a causal one, damaged or incomplete weights, rows longer than it has positions.
    """
    return load_model(config.path, config, tokenizer=tokenizer, length=length, dtype=dtype, device=device)
