"""A model's shapes without its weights: 🤗 modules on torch's meta device, whatever their size."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..adapters.peft import CONFIG as ADAPTER
from ..errors import InputError, nearest
from ..models.llama import PRESETS, shape
from ..models.loading import configuration, loading
from .trained import model_of

WORDS = 32_000
"""Vocabulary of a preset: that of the papers which name models by these sizes."""


def shape_of(name: str) -> PretrainedConfig:
    """The 🤗 configuration of a model.

    Args:
        name: a preset of the model `llama`, a 🤗 folder or hub id, or the folder of a run.

    Raises:
        InputError: no such model, or an adapter.
    """
    if name in PRESETS:
        return shape(name, WORDS, tie_word_embeddings=False)
    path = Path(name)
    if not path.exists() and "/" not in name:
        raise InputError(
            f"model {name!r} is neither a preset nor a folder; {nearest(name, PRESETS)}; a hub id is owner/name"
        )
    folder = model_of(path) if (path / "run.json").is_file() else path
    if (folder / ADAPTER).is_file():
        raise InputError(f"{name} holds an adapter, not a model; give the model that it was trained on")
    found: PretrainedConfig = configuration(str(folder) if path.exists() else name)
    return found


def skeleton(name: str) -> PreTrainedModel:
    """The model that `shape_of` describes, on the meta device: shapes and names, no memory.

    Raises:
        InputError: no such model.
    """
    told = shape_of(name)
    with loading("architecture", name), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(told, trust_remote_code=False)
        model.tie_weights()
    return model
