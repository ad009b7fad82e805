"""`fallline plan`: will it fit, and what else would."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Sequence

import torch

from ..drivers.plan import Forecast
from ..drivers.plan.check import at_hand
from ..drivers.plan.question import explain, plan
from ..drivers.plan.speed import calibrate
from ..drivers.plan.table import ORDER, Row
from ..drivers.setting import pick_device
from ..errors import InputError
from ..metrics.progress import duration

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SHOWN = 24

Rated = tuple[Row, float | None]
"""A row and, if that was asked, tokens per second."""


def run(args: Namespace) -> int:
    """Print the table, or where every byte of one combination goes.

    Raises:
        InputError: no such model, or an impossible option.
    """
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device is auto, cpu or cuda, got {args.device!r}")
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps must be at least 1, got {args.steps}")
    memory = free(device) if args.memory is None else size(args.memory)
    if args.explain is not None:
        if args.all or args.speed or args.steps is not None:
            raise InputError("--all, --speed and --steps are about the table; --explain shows one combination")
        row = explain(args.model, args.explain, memory=memory, length=args.length, batch=args.batch, device=device)
        print(json.dumps(row.to_mapping(), indent=2) if args.json else "\n".join(explained(row, memory)))
        return 0
    rows = plan(args.model, memory=memory, length=args.length, batch=args.batch, device=device)
    rates: list[float | None] = [None] * len(rows)
    if args.speed or args.steps is not None:
        speed = calibrate(rows[0].setup, pick_device(device))
        rates = [args.batch * args.length / speed.step(r.forecast, math.ceil(args.batch / r.setup.rows)) for r in rows]
    rated = list(zip(rows, rates, strict=True))
    if args.json:
        told = [row.to_mapping() | {"tokens_per_second": rate, "seconds": seconds(args, rate)} for row, rate in rated]
        print(json.dumps({"model": args.model, "memory": round(memory), "rows": told}, indent=2))
        return 0
    print("\n".join(table(args.model, rated if args.all else shortened(rated), memory, len(rows))))
    first = seconds(args, rates[0])
    if first is not None:
        print(f"{args.steps} steps as in the first line take about {duration(first)}")
    return 0


def seconds(args: Namespace, rate: float | None) -> float | None:
    """Of the steps that were asked for."""
    return None if args.steps is None or not rate else args.steps * args.batch * args.length / rate


def free(device: str) -> float:
    """The memory at hand on this machine.

    Raises:
        InputError: nobody knows, or there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU here whose memory is free; give --memory SIZE")
    found = at_hand(pick_device(device))
    if found is None:
        raise InputError("this system does not say how much memory is free; give --memory SIZE")
    return found


def size(text: str) -> float:
    """Bytes from such as 24GiB.

    Raises:
        InputError: it is no size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", text)
    unit = found and UNITS.get(found[2].lower() or "b")
    if not found or not unit or not 0 < float(found[1]) * unit < math.inf:
        raise InputError(f"--memory is a size such as 24GiB, 800MiB or 16GB, got {text!r}")
    return float(found[1]) * unit


def shortened(rows: Sequence[Rated]) -> list[Rated]:
    """The best rows, of each optimizer with an adapter or without one the first."""
    seen, found = set(), []
    for row, rate in rows:
        key = row.setup.optimizer.id, row.setup.adapter.id
        if key not in seen:
            seen.add(key)
            found.append((row, rate))
    return found[:SHOWN]


def table(model: str, rows: Sequence[Rated], memory: float, number: int) -> list[str]:
    """Lines of text."""
    first, rate = rows[0]
    setup, found = first.setup, first.forecast
    own = found.parameters - (found.trained if setup.adapter.id != "none" else 0)
    lines = [
        f"{model}: {own:,} parameters, rows of {setup.length} tokens, {gib(memory)} GiB of memory",
        "",
        "fits   optimizer     adapter  precision            ckpt  rows   weights  gradients  state  activations   peak"
        + ("" if rate is None else "  tokens/s"),
    ]
    for row, rate in rows:
        s, f = row.setup, row.forecast
        lines.append(
            f"{row.fits:6} {s.optimizer.id:13} {s.adapter.id:8} {s.precision:20} "
            f"{'yes' if s.options.checkpointing else 'no':5} {s.rows:4} {gib(f.weights):>9} {gib(f.gradients):>10} "
            f"{gib(f.optimizer):>6} {gib(f.activations):>12} {gib(f.peak):>6}"
            + ("" if rate is None else f" {rate:9,.0f}")
        )
    return [
        *lines,
        "",
        f"GiB; not all at one time, so that they do not add up to the peak. Order: {ORDER}.",
        f"{len(rows)} of {number} combinations" + ("; all of them: --all" if len(rows) < number else ""),
        *([f"Assumed: {first.forecast.assumed}"] if first.forecast.assumed else []),
    ]


def explained(row: Row, memory: float) -> list[str]:
    """Where every byte of a combination goes, as lines of text."""
    s, f = row.setup, row.forecast
    lines = [
        f"{s.optimizer.id}, adapter {s.adapter.id}, {s.precision}, "
        f"{'with' if s.options.checkpointing else 'no'} checkpointing, {s.rows} rows of {s.length} tokens at a time",
        f"{f.parameters:,} parameters, {f.trained:,} of them trained",
        "",
        "what stays       weights  gradients  state",
    ]
    for role, parts in f.roles.items():
        lines.append(f"{role:14} {gib(parts['weights']):>9} {gib(parts['gradients']):>10} {gib(parts['optimizer']):>6}")
    lines += ["", "when           weights  state  gradients   rest  total"]
    for phase, moment in f.moments.items():
        mark = "  ← highest" if phase == f.height else ""
        lines.append(
            f"{phase:14} {gib(f.weights):>7} {gib(f.optimizer):>6} {gib(moment.gradients):>10} {gib(moment.rest):>6} "
            f"{gib(f.weights + f.optimizer + moment.total):>6}{mark}"
        )
    if f.assumed:
        lines += ["", f"Assumed: {f.assumed}"]
    return [
        *lines,
        "",
        f"{gib(f.overhead)} GiB for kernels and allocator; peak {gib(f.peak)} GiB of {gib(memory)}: "
        f"{verdicts(row, f, memory)}",
    ]


def verdicts(row: Row, f: Forecast, memory: float) -> str:
    """The answer in words."""
    if row.fits == "no":
        return f"does not fit, {gib(f.peak - memory)} GiB too much"
    return "fits" if row.fits == "yes" else "fits, if the forecast is no more than a tenth too low"


def gib(number: float) -> str:
    """Bytes as GiB, three digits where there are any."""
    value = number / 2**30
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value else "0"
