"""A LoRA as PEFT stores it, read back; see `peft`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .base import Adapter
from .layers import sizes
from .lora import Config, Lora
from .peft_reading import by_layer, known

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
        "init_lora_weights",
        "qalora_group_size",  # without use_qalora
        "ensure_weight_tying",  # concerns modules_to_save
    }
)
"""Keys of PEFT's configuration that are understood, or say nothing alone."""

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Beginnings (`init_lora_weights`) that leave the base weights alone; PEFT changes them for the others, again at every
load."""


def read(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, folder: Path
) -> dict[str, tuple[Adapter, dict[str, Tensor]]]:
    """
    Raises:
        InputError: an option that is not known, or tensors that do not fit the model.
    """
    where = folder / "adapter_config.json"
    start = settings.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise InputError(
            f"{where}: 'init_lora_weights' is {start!r}, which changes the base weights too; convert it to a plain "
            "LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    known(settings, READ, where)
    found = by_layer(tensors, r"\.lora_([AB])\.weight", "a LoRA", model, folder)
    for path, both in found.items():
        m, n = sizes(model.get_submodule(path))
        if set(both) != {"A", "B"}:
            raise InputError(f"{folder}: {path!r} has only one of lora_A and lora_B")
        A, B = both["A"], both["B"]
        if A.ndim != 2 or B.ndim != 2 or A.shape[1] != n or B.shape != (m, len(A)):
            shapes = f"lora_A {list(A.shape)} and lora_B {list(B.shape)}"
            raise InputError(f"{folder}: {shapes} do not fit {path!r} with its weight of {m} × {n}")
    try:
        base = Config(
            rank=settings["r"],
            alpha=settings.get("lora_alpha", 8),
            rslora=settings.get("use_rslora") or False,
            dropout=settings.get("lora_dropout") or 0.0,
        )
        alphas = settings.get("alpha_pattern") or {}
        return {
            path: (
                Lora(replace(base, rank=len(both["A"]), alpha=matching(alphas, path, base.alpha))),
                {"lora_A": both["A"], "lora_B": both["B"]},
            )
            for path, both in found.items()
        }
    except (InputError, AttributeError, TypeError, re.error) as error:
        raise InputError(f"{where} cannot be used: {error}") from None


def matching(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the pattern that fits a path, as PEFT matches them: a regular expression for its end."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
