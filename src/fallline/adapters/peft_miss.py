"""MiSS and BAT as PEFT stores them, read back; see `peft`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from . import bat, miss
from .base import Adapter
from .layers import sizes
from .peft_reading import by_layer, known

READ = frozenset({"peft_type", "r", "miss_dropout", "mini_r", "init_weights", "bias"})
"""Keys of PEFT's configuration that are understood."""


def read(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, folder: Path
) -> dict[str, tuple[Adapter, dict[str, Tensor]]]:
    """
    Raises:
        InputError: an option that is not known, or tensors that do not fit the model.
    """
    where = folder / "adapter_config.json"
    kind = settings.get("init_weights", True)
    if kind not in (True, False, "bat", "mini"):
        raise InputError(f"{where}: 'init_weights' is {kind!r}, which this version does not know")
    known(settings, READ, where)
    rank, dropout = settings["r"], settings.get("miss_dropout") or 0.0
    method: Adapter
    try:
        if kind == "bat":  # PEFT has no dropout there, whatever the configuration says
            method = bat.Bat(bat.Config(rank=rank))
        else:
            mini = settings.get("mini_r", 1) if kind == "mini" else 0
            method = miss.Miss(miss.Config(rank=rank, mini=mini, dropout=dropout))
    except InputError as error:
        raise InputError(f"{where} cannot be used: {error}") from None
    found: dict[str, tuple[Adapter, dict[str, Tensor]]] = {}
    for path, own in by_layer(tensors, r"\.(miss_block)", "a MiSS", model, folder).items():
        m, n = sizes(model.get_submodule(path))
        ((name, shape),) = method.shapes(m, n).items()
        t = own["miss_block"]
        t = t.t() if t.ndim == 2 else t
        if t.shape != shape:
            raise InputError(
                f"{folder}: miss_block {list(own['miss_block'].shape)} does not fit {path!r} with its weight of {m} × "
                f"{n} and 'r' = {rank}"
            )
        found[path] = (method, {name: t})
    return found
