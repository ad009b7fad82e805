"""Refusing what cannot fit, before it takes hours to find out."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ...errors import InputError
from ...optim.precision import DTYPES
from ...recipe import Recipe
from ..allocator import thrift
from .forecast import Setup, forecast, setup_of
from .table import Row, combinations

log = logging.getLogger("fallline")

NEAREST = 3
"""Combinations that are named in place of one that does not fit."""

LOOSE = 2.5
"""What glibc's allocator may take for each byte of a tensor, unless it is told to give freed blocks back."""

SLACK = 4
"""How far below the memory at hand a rough bound must be for the forecast to be spared, which takes two seconds."""

GROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
"""Where a container sees the limit of its memory: control groups of version 2, and 1."""


def check(recipe: Recipe, shape: PretrainedConfig, device: torch.device, *, force: bool = False) -> None:
    """Compare what a recipe will take with what there is; where it is scarce, have the allocator be thrifty.

    Args:
        shape: the model's 🤗 configuration. device: where it will be trained.
        force: refuse nothing.

    Raises:
        InputError: it cannot fit; the message names what could.
    """
    free = at_hand(device)
    setup = setup_of(recipe, shape, device.type)
    if free is None or SLACK * bound(setup) < free:
        return
    try:
        found = forecast(setup)
    except InputError as error:  # if it is the recipe's fault, that is told when the parts are built
        log.warning("the memory of this run was not forecast: %s", error)
        return
    needed = found.peak
    if needed > free:
        if not force and not found.assumed:
            raise InputError(refusal(recipe, setup, needed, free))
        assumed = f"; assumed: {found.assumed}" if found.assumed else ""
        log.warning("this run may need %s where %s are free%s", size(needed), size(free), assumed)
    if device.type == "cpu" and needed > free / LOOSE and thrift():
        log.warning(
            "this run needs about %s of the %s that are free: freed memory is given back at once, which takes time",
            size(needed),
            size(free),
        )


def refusal(recipe: Recipe, setup: Setup, needed: float, free: float) -> str:
    """Why a run is not begun, and what could be."""
    trained = recipe.model.module.Config.brings_tokenizer  # so it has weights that an adapter can be put beside
    fitting = [f"{' '.join(words)} ({size(row.forecast.peak)})" for words, row in nearest(setup, free, trained)]
    instead = f"these would fit: {'; '.join(fitting)}" if fitting else "nothing like it would fit"
    return (
        f"this run needs about {size(needed)} and {size(free)} of memory are free; {instead}; "
        "`fallline plan` shows all; --force starts it all the same"
    )


def nearest(setup: Setup, free: float, adapters: bool) -> list[tuple[list[str], Row]]:
    """The combinations that would fit and change least, with the words of a recipe that ask for them: of what changes
    the same keys the one nearest to the old, see `distance`, and more keys only where that leaves more rows at a time.

    Args:
        setup: what does not fit. free: bytes there are. adapters: may one be put on the model?
    """
    spared = setup.options.checkpointing
    rows = combinations(setup, memory=free, adapters=adapters)
    fitting = sorted((r for r in rows if r.fits != "no" and r.setup.options.checkpointing >= spared), key=distance)
    found: list[tuple[dict[str, str], Row]] = []
    for words, row in sorted(((changed(setup, row.setup), row) for row in fitting), key=lambda pair: len(pair[0])):
        if not any(words.keys() >= fewer.keys() and row.setup.rows <= other.setup.rows for fewer, other in found):
            found.append((words, row))
    return [([f"{key}={value}" for key, value in words.items()], row) for words, row in found[:NEAREST]]


def distance(row: Row) -> tuple[Any, ...]:
    """As `Row.order`, but of what does otherwise the same rather more memory: it is nearer to what was asked for."""
    return *row.order[:-1], -row.forecast.peak


def changed(old: Setup, new: Setup) -> dict[str, str]:
    """What of a recipe makes one of the other: key → value."""
    pairs = {
        "micro": (old.rows, new.rows),
        "model.checkpointing": (old.options.checkpointing, new.options.checkpointing),
        "precision": (old.precision, new.precision),
        "optimizer": (old.optimizer.id, new.optimizer.id),
        "adapter": (old.adapter.id, new.adapter.id),
    }
    return {key: str(value).lower() for key, (before, value) in pairs.items() if before != value}


def bound(setup: Setup) -> float:
    """More bytes than a run of ordinary architecture takes, by arithmetic alone; infinite for any other."""
    text = setup.shape.get_text_config()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes: list[Any] = [getattr(text, name, None) for name in names]
    sizes.append(getattr(text, "intermediate_size", None) or 4 * (sizes[1] or 0))
    experts = any("expert" in name and not name.startswith("_") for name in vars(text))
    if experts or not all(isinstance(number, int) for number in sizes):
        return math.inf
    words, hidden, layers, heads, inner = sizes
    weights = 2 * words * hidden + layers * (4 * hidden**2 + 3 * hidden * inner)
    tokens = setup.rows * setup.length
    kept = tokens * layers * (32 * hidden + 8 * inner) + 8 * setup.rows * setup.length**2
    if setup.options.attention == "eager":
        kept += 4 * layers * heads * setup.rows * setup.length**2
    return 4.0 * (5 * weights + kept) * (2 if DTYPES[setup.precision] != torch.float32 else 1)


def at_hand(device: torch.device) -> float | None:
    """Bytes that can still be taken; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    if device.type != "cpu":
        return None
    table = Path("/proc/meminfo")
    rows = table.read_text().splitlines() if table.is_file() else []
    found = [1024.0 * int(row.split()[1]) for row in rows if row.startswith("MemAvailable:")]
    return min([*found, *(left for group in GROUPS if (left := left_in(group)) is not None)], default=None)


def left_in(group: Path) -> float | None:
    """Bytes that the limit of a control group leaves; None where there is no limit. Pages of files that nobody has
    used of late count as free: they go as soon as they are in the way."""
    one = (group / "memory.limit_in_bytes").is_file()  # version 1
    try:
        names = ("limit_in_bytes", "usage_in_bytes") if one else ("max", "current")
        limit, used = (float((group / f"memory.{name}").read_text()) for name in names)
        rows = (row.split() for row in (group / "memory.stat").read_text().splitlines())
        counts = {name: float(number) for name, number in rows}
    except (OSError, ValueError):  # no group; or "max", no limit
        return None
    return limit - used + counts.get("total_inactive_file" if one else "inactive_file", 0.0)


def size(number: float) -> str:
    """Bytes in words."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
