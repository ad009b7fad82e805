"""What the readers of PEFT's formats share; see `peft`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .layers import select

IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "revision",
        "target_modules",  # the tensors themselves say where
        "task_type",
    }
)
"""Keys of any configuration of PEFT's that do not change what a saved adapter computes."""


def known(settings: Mapping[str, Any], read: frozenset[str], where: Path) -> None:
    """
    Raises:
        InputError: a setting that is neither in `read` nor `IGNORED` nor off, trained biases, or no rank.
    """
    for key, value in settings.items():
        if key not in read | IGNORED and value not in (None, False, {}, []):
            raise InputError(f"{where}: {key!r} is {value!r}, which this version does not know")
    if settings.get("bias", "none") != "none":
        raise InputError(f"{where}: trained biases (bias: {settings['bias']!r}) cannot be loaded")
    if "r" not in settings:
        raise InputError(f"{where}: there is no 'r', the rank")


def by_layer(
    tensors: Mapping[str, Tensor], end: str, what: str, model: nn.Module, folder: Path
) -> dict[str, dict[str, Tensor]]:
    """Path → what the group in the pattern `end` says → tensor.

    Args:
        tensors: by PEFT's names without prefix.
        end: pattern of the end of a name, behind the layer's path; its one group tells a layer's tensors apart.
        what: they are of, for errors.
        model, folder: whose layers, and where the tensors are from.

    Raises:
        InputError: a tensor of something else, or of a layer that the model does not have.
    """
    linear = set(select(model, ("*",)))
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        match = re.fullmatch(rf"(.+){end}", key)
        if match is None:
            raise InputError(f"{folder}: {key!r} is not of {what} on a linear layer")
        if match[1] not in linear:
            raise InputError(f"{folder}: the model has no linear layer {match[1]!r}; it is of another base model")
        found.setdefault(match[1], {})[match[2]] = t
    return found
