"""RandLoRA as PEFT stores it, read back; see `peft`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .base import Adapter
from .layers import sizes
from .peft_reading import by_layer, known
from .randlora import Config, RandLora, room

READ = frozenset(
    {
        "peft_type",
        "r",
        "randlora_alpha",
        "randlora_dropout",
        "save_projection",
        "projection_prng_key",  # the random matrices are in the file
        "sparse",  # how they were drawn
        "very_sparse",
        "fan_in_fan_out",
        "init_weights",
        "bias",
    }
)
"""Keys of PEFT's configuration that are understood, or say nothing alone."""

NAMES = {"lambda": "lam", "gamma": "gam"}


def read(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, folder: Path
) -> dict[str, tuple[Adapter, dict[str, Tensor]]]:
    """
    Raises:
        InputError: an option that is not known, or tensors that are not there or do not fit the model.
    """
    where = folder / "adapter_config.json"
    known(settings, READ, where)
    bases = {}
    for key in ("A", "B"):  # PEFT repeats them with every layer
        bases[key] = next((t for name, t in tensors.items() if name.endswith(f".randlora_{key}")), None)
    A, B = bases["A"], bases["B"]
    if A is None or B is None:
        raise InputError(
            f"{folder}: the random matrices randlora_A and randlora_B are not there; save with save_projection=True"
        )
    own = {key: t for key, t in tensors.items() if not key.endswith((".randlora_A", ".randlora_B"))}
    layers = by_layer(own, r"\.randlora_(lambda|gamma)", "a RandLoRA", model, folder)
    if not layers:
        return {}
    try:
        config = Config(
            rank=settings["r"],
            alpha=settings.get("randlora_alpha", 640),
            dropout=settings.get("randlora_dropout") or 0.0,
        )
    except InputError as error:
        raise InputError(f"{where} cannot be used: {error}") from None
    fitting = {path: sizes(model.get_submodule(path)) for path in layers}
    (rank, small), (large, number, _) = room(list(fitting.values()), config.rank)
    fits = A.ndim == B.ndim == 3 and A.shape[:2] == (rank, 1) and B.shape[2] == rank
    if not fits or A.shape[2] < small or B.shape[0] < large or B.shape[1] < number:
        raise InputError(
            f"{folder}: randlora_A {list(A.shape)} and randlora_B {list(B.shape)} are too small for the model, or not "
            f"of 'r' = {rank}"
        )
    method = RandLora(config, {"A": A.squeeze(1), "B": B})
    for path, both in layers.items():
        wanted = method.shapes(*fitting[path])
        if {NAMES[key]: tuple(t.shape) for key, t in both.items()} != wanted:
            shapes = " and ".join(f"randlora_{key} {list(t.shape)}" for key, t in sorted(both.items()))
            m, n = fitting[path]
            raise InputError(f"{folder}: {shapes} do not fit {path!r} with its weight of {m} × {n} and 'r' = {rank}")
    return {path: (method, {NAMES[key]: t for key, t in both.items()}) for path, both in layers.items()}
