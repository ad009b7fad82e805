"""Adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors` in a folder.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    [r, n]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    [m, r]

`peft.PeftModel.from_pretrained(base, folder)` loads what `save` writes: a method that PEFT has is stored as PEFT stores
it, every other as the LoRA that its change is (`Adapter.factors`). `load` takes what PEFT writes for the methods of
`FORMATS`. Beside an adapter `o3` lies its gate, which PEFT knows nothing of: there the LoRA counts for every input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError, nearest
from ..folders import readable
from . import peft_lora, peft_miss, peft_randlora
from .base import Adapter
from .gated import Gating
from .layers import Adapted, adapted, can_adapt, names, put, select
from .o3_gate import FILE as GATE
from .o3_gate import Gate

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ONCE = "base_model."
"""Prefix of what is not of one layer."""

Read = Mapping[str, tuple[Adapter, Mapping[str, Tensor]]]
"""Path of a layer → the method with its options there, and its tensors by name."""

FORMATS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Tensor], nn.Module, Path], Read]] = {
    "LORA": peft_lora.read,
    "MISS": peft_miss.read,
    "RANDLORA": peft_randlora.read,
}
"""PEFT's type → what reads it: its configuration, tensors without `PREFIX`, the model, and the folder for errors."""


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
    method = next(iter(layers.values())).methods[name]
    settings = {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,  # PEFT asks for that
        "base_model_name_or_path": base or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "target_modules": short_names(model, list(layers)),
        "bias": "none",
        "inference_mode": True,
    }
    with torch.no_grad():
        tensors = {
            f"{PREFIX}{path}.{key}": t.detach().to("cpu").contiguous()
            for path, layer in layers.items()
            for key, t in layer.methods[name].stored(layer.adapters[name]).items()
        }
        first = next(iter(layers.values())).adapters[name]
        for key, t in method.stored_once(first).items():
            tensors[f"{ONCE}{key}"] = t.detach().to("cpu").contiguous()
        if method.peft_type == "LORA":
            settings |= ranks(layers, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings | method.peft_config(), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    if (more := method.beside()) is not None:
        more.save(folder)
    readable(folder)


def ranks(layers: Mapping[str, Adapted], name: str) -> dict[str, Any]:
    """What PEFT's configuration of a LoRA says of ranks and α, and of layers that store Wᵀ."""
    found = {path: layer.methods[name].factors(layer.adapters[name]) for path, layer in layers.items()}
    first = next(iter(found.values()))
    r, alpha = len(first.A), first.alpha
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {pattern(path, found): len(each.A) for path, each in found.items() if len(each.A) != r},
        "alpha_pattern": {pattern(path, found): each.alpha for path, each in found.items() if each.alpha != alpha},
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
    }


def pattern(path: str, paths: Iterable[str]) -> str:
    """What PEFT finds just this one of these paths by: it looks at ends of paths, unless told where they begin."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in paths) else path


def short_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The last parts of these paths where they name just these layers, also among what is no linear layer, where PEFT
    looks too; else the paths."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    others = (p for p, m in model.named_modules() if not can_adapt(m) and ".adapters" not in p)
    just = sorted(select(model, short)) == sorted(paths) and not any(p.rpartition(".")[2] in short for p in others)
    return short if just else sorted(paths)


def load(model: nn.Module, folder: str | Path, *, name: str = "default") -> Any:
    """Put an adapter that PEFT or `save` wrote on a model, in place; it is the active one, and can be trained further.
    One that has a gate beside it counts as that says.

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
    gate = Gate.load(folder) if (folder / GATE).is_file() else None
    try:
        stored = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {folder / TENSORS}: {error}") from None
    tensors = {key.removeprefix(PREFIX): t for key, t in stored.items()}
    found = FORMATS[settings["peft_type"]](settings, tensors, model, folder)
    if not found:
        raise InputError(f"{folder / TENSORS} holds no tensors")
    put(model, {path: method for path, (method, _) in found.items()}, name)
    layers = adapted(model)
    with torch.no_grad():
        for path, (_, values) in found.items():
            for key, t in values.items():
                getattr(layers[path].adapters[name], key).copy_(t)
    if gate is not None:
        Gating(model, name, gate)
    return model


def read_settings(folder: Path) -> dict[str, Any]:
    """PEFT's configuration.

    Raises:
        InputError: it is not there, cannot be read, or is of a kind of adapter that is not known here.
    """
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind not in FORMATS:
        raise InputError(f"{path}: the adapter is a {kind!r}; only {', '.join(FORMATS)} can be loaded")
    found: dict[str, Any] = settings
    return found
