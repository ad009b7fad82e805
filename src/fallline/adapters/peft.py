"""Adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors` in a folder.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    [r, n]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    [m, r]

`peft.PeftModel.from_pretrained(base, folder)` loads what `save` writes, and `load` what PEFT writes for a LoRA.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, nearest
from ..folders import readable
from .layers import adapted, names, put, select
from .lora import Config, Lora

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."

IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",  # concerns modules_to_save
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # without use_qalora
        "revision",
        "target_modules",  # the tensors themselves say where
        "task_type",
    }
)
"""Keys of PEFT's configuration that do not change what a saved LoRA computes."""

READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
    }
)
"""Keys that `load` understands."""

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Beginnings (`init_lora_weights`) that leave the base weights alone; PEFT changes them for the others, again at every
load."""


def save(model: nn.Module, folder: str | Path, *, name: str = "default", base: str | None = None) -> None:
    """Write an adapter as a PEFT checkpoint.

    Args:
        model: has it.
        folder: made when it is not there.
        name: which of the model's adapters.
        base: id or folder of the base model, for those who load by it; None: what the model says it was loaded from.

    Raises:
        InputError: no adapter of that name.
        OSError: the disk refuses.
    """
    if name not in names(model):
        raise InputError(f"the model has no adapter {name!r}; {nearest(name, names(model))}")
    layers = {path: layer for path, layer in adapted(model).items() if name in layer.adapters}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in layers.items():
        found = layer.methods[name].factors(layer.adapters[name])
        for key, t in (("lora_A", found.A), ("lora_B", found.B)):
            tensors[f"{PREFIX}{path}.{key}.weight"] = t.detach().to("cpu").contiguous()
        ranks[path], alphas[path] = len(found.A), found.alpha
    first = next(iter(layers.values())).methods[name].peft_config()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "target_modules": short_names(model, list(layers)),
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
        "rank_pattern": {path: r for path, r in ranks.items() if r != first["r"]},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != first["lora_alpha"]},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(settings | first, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    readable(folder)


def short_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The last parts of these paths where they name just these layers, else the paths."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    return short if sorted(select(model, short)) == sorted(paths) else sorted(paths)


def load(model: nn.Module, folder: str | Path, *, name: str = "default") -> Any:
    """Put a LoRA that PEFT or `save` wrote on a model, in place; it is the active one, and can be trained further.

    Args:
        model: the base model it was made for.
        folder: has `adapter_config.json` and `adapter_model.safetensors`.
        name: to give it.

    Returns:
        The model.

    Raises:
        InputError: not such a folder, a kind of adapter or an option that is not known here, or tensors that do not
            fit the model. The model is then as it was.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {folder / TENSORS}: {error}") from None
    pairs = paired(tensors, model, folder)
    try:
        base = Config(
            rank=settings["r"],
            alpha=settings.get("lora_alpha", 8),
            rslora=settings.get("use_rslora") or False,
            dropout=settings.get("lora_dropout") or 0.0,
        )
        alphas = settings.get("alpha_pattern") or {}
        chosen = {
            path: Lora(replace(base, rank=len(A), alpha=matching(alphas, path, base.alpha)))
            for path, (A, _) in pairs.items()
        }
    except (InputError, AttributeError, TypeError, re.error) as error:
        raise InputError(f"{folder / CONFIG} cannot be used: {error}") from None
    put(model, chosen, name)
    layers = adapted(model)
    with torch.no_grad():
        for path, (A, B) in pairs.items():
            P: Any = layers[path].adapters[name]
            P.lora_A.copy_(A)
            P.lora_B.copy_(B)
    return model


def read_settings(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of a LoRA.

    Raises:
        InputError: it is not there, cannot be read, or is of something else than a plain LoRA.
    """
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise InputError(f"{path}: the adapter is a {kind!r}; only LORA can be loaded")
    start = settings.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise InputError(
            f"{path}: 'init_lora_weights' is {start!r}, which changes the base weights too; convert it to a plain LoRA "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    for key, value in settings.items():
        if key not in READ | IGNORED | {"init_lora_weights"} and value not in (None, False, {}, []):
            raise InputError(f"{path}: {key!r} is {value!r}, which this version does not know")
    if settings.get("bias", "none") != "none":
        raise InputError(f"{path}: trained biases (bias: {settings['bias']!r}) cannot be loaded")
    if "r" not in settings:
        raise InputError(f"{path}: there is no 'r', the rank")
    return settings


def paired(tensors: Mapping[str, Tensor], model: nn.Module, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Path → (A, B).

    Raises:
        InputError: a tensor that is not of a LoRA on a linear layer, is missing, or does not fit the model.
    """
    linear = set(select(model, ("*",)))
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise InputError(f"{folder / TENSORS}: {key!r} is not of a LoRA on a linear layer")
        if match[1] not in linear:
            raise InputError(f"{folder}: the model has no linear layer {match[1]!r}; it is of another base model")
        found.setdefault(match[1], {})[match[2]] = t
    if not found:
        raise InputError(f"{folder / TENSORS} holds no tensors")
    modules: Any = dict(model.named_modules())
    for path, both in found.items():
        m, n = modules[path].weight.shape[:: -1 if isinstance(modules[path], Conv1D) else 1]
        if set(both) != {"A", "B"}:
            raise InputError(f"{folder / TENSORS}: {path!r} has only one of lora_A and lora_B")
        A, B = both["A"], both["B"]
        if A.ndim != 2 or B.ndim != 2 or A.shape[1] != n or B.shape != (m, len(A)):
            shapes = f"lora_A {list(A.shape)} and lora_B {list(B.shape)}"
            raise InputError(f"{folder}: {shapes} do not fit {path!r} with its weight of {m} × {n}")
    return {path: (both["A"], both["B"]) for path, both in found.items()}


def matching(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the pattern that fits a path, as PEFT matches them: a regular expression for its end."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
