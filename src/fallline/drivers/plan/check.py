"""Refusing what cannot fit, before it takes hours to find out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from ...errors import InputError
from ...optim.precision import DTYPES
from ...recipe import Recipe
from ..allocator import thrift
from .forecast import Setup, default, forecast, setup_of

log = logging.getLogger("fallline")

NEAREST = 3
"""Combinations that are named in place of one that does not fit."""

LOOSE = 2.5
"""What glibc's allocator may take for each byte of a tensor, unless it is told to give freed blocks back."""

SLACK = 4
"""How far below the memory at hand a rough bound must be for the forecast to be spared, which takes two seconds."""


class Way(NamedTuple):
    """Another combination: the words of a recipe that ask for it."""

    words: str
    setup: Setup


def check(recipe: Recipe, shape: PretrainedConfig, device: torch.device) -> None:
    """Compare what a recipe will take with what there is; where it is scarce, have the allocator be thrifty.

    Args:
        shape: the model's 🤗 configuration. device: where it will be trained.

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
    if found.assumed and needed > free:
        log.warning("this run may need %s where %s are free; assumed: %s", size(needed), size(free), found.assumed)
        return
    if needed <= free:
        if device.type == "cpu" and needed > free / LOOSE and thrift():
            log.warning(
                "this run needs about %s of the %s that are free: freed memory is given back at once, which takes time",
                size(needed),
                size(free),
            )
        return
    fitting = [f"{way.words} ({size(peak)})" for way in ways(setup) if (peak := forecast(way.setup).peak) <= free]
    instead = f"these would fit: {'; '.join(fitting[:NEAREST])}" if fitting else "nothing near it would"
    raise InputError(
        f"this run needs about {size(needed)} and {size(free)} of memory are free; {instead}; "
        "`fallline plan` shows all; --force starts it all the same"
    )


def ways(setup: Setup) -> Iterator[Way]:
    """Combinations near one, those that change least first."""
    half = setup.rows // 2
    spared = replace(setup, options=replace(setup.options, checkpointing=True))
    if half:
        yield Way(f"micro={half}", replace(setup, rows=half, several=True))
    if not setup.options.checkpointing:
        yield Way("model.checkpointing=true", spared)
        if half:
            yield Way(f"model.checkpointing=true micro={half}", replace(spared, rows=half, several=True))
    lean = replace(spared, rows=1, several=True)
    for optimizer in ("adamw-8bit", "scale"):
        if setup.optimizer.id != optimizer:
            other = replace(lean, optimizer=default("optimizer", optimizer))
            yield Way(f"optimizer={optimizer} model.checkpointing=true micro=1", other)
    if setup.adapter.id == "none":
        adapter = default("adapter", "lora")
        yield Way("adapter=lora", replace(setup, adapter=adapter))
        yield Way("adapter=lora model.checkpointing=true micro=1", replace(lean, adapter=adapter))


def bound(setup: Setup) -> float:
    """More bytes than a run of ordinary architecture takes, by arithmetic alone; infinite for any other."""
    text = setup.shape.get_text_config()
    try:
        hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
        words = text.vocab_size
    except AttributeError:
        return float("inf")
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    weights = 2 * words * hidden + layers * (4 * hidden**2 + 3 * hidden * inner)
    tokens = setup.rows * setup.length
    kept = tokens * layers * (32 * hidden + 8 * inner) + 8 * setup.rows * setup.length**2
    if setup.options.attention == "eager":
        kept += 4 * layers * heads * setup.rows * setup.length**2
    return 4.0 * (5 * weights + kept) * (2 if DTYPES[setup.precision] != torch.float32 else 1)


def at_hand(device: torch.device) -> float | None:
    """Bytes that can still be taken; None where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    table = Path("/proc/meminfo")
    rows = table.read_text().splitlines() if table.is_file() else []
    found = [1024.0 * int(row.split()[1]) for row in rows if row.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")  # of a container; version 2
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        found.append(float(limit) - float(used))
    except (OSError, ValueError):
        pass  # no group, or "max": no limit
    return min(found, default=None)


def size(number: float) -> str:
    """Bytes in words."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
