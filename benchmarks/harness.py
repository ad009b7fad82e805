"""Honest timings: interleaved rounds, spread beside every number, peak memory in a process of its own.

    rounds = compare({"torch": f, "fallline": g})       # seconds per call; ratios are to the first
    peaks = peak_memory(__file__, ["torch", "fallline"])  # bytes above what the inputs take
    save("linear_cross_entropy", {"time": rounds, "peak": peaks}, sources=[...])

A script that wants memory answers to ``--peak NAME`` by building that contestant and printing `peak_of(contestant)`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fallline.catalog import code_hash
from fallline.drivers.compare.measuring import VOID_ABOVE, spread
from fallline.drivers.compare.meter import forget_peak
from fallline.drivers.setting import processor
from fallline.metrics import peak_memory as process_peak
from fallline.metrics import resident_memory

LEAST_PAIRS = 7
"""Rounds below which a median and its spread say nothing."""

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def compare(contestants: Mapping[str, Callable[[], Any]], pairs: int = LEAST_PAIRS, warmup: int = 2) -> dict[str, Any]:
    """Time contestants in turn, so that whatever slows the machine slows all of them.

    Every round calls each contestant once; every second round goes backwards. A ratio is the median over rounds of the
    contestant's time by the first contestant's in the same round. A spread is the interquartile range by the median.

    Args:
        contestants: name → what to time; the first is what the others are compared with.
        pairs: rounds that count, at least `LEAST_PAIRS`.
        warmup: rounds before them that do not.

    Returns:
        ``contestants`` {name: median, min, spread, ratio, ratio_spread, void}, ``rounds`` {name: seconds}, and
        ``load_before``, ``load_after``, the machine's load averages over one minute.

    Raises:
        ValueError: too few pairs.
    """
    if pairs < LEAST_PAIRS:
        raise ValueError(f"{pairs} pairs are too few for a timing: at least {LEAST_PAIRS}")
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    load_before = os.getloadavg()[0]
    for i in range(-warmup, pairs):
        for name in names if i % 2 == 0 else reversed(names):
            start = time.perf_counter()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    first = seconds[names[0]]
    found = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, first, strict=True)]
        found[name] = {
            "median": statistics.median(times),
            "min": min(times),
            "spread": spread(times),
            "ratio": statistics.median(ratios),
            "ratio_spread": spread(ratios),
            "void": spread(times) > VOID_ABOVE,
        }
    return {
        "contestants": found,
        "rounds": seconds,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
    }


def fallline(*words: str) -> float:
    """Run a command of the package at the repository's root; the seconds that it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fallline", *words], check=True, cwd=ROOT)
    return time.perf_counter() - start


def peak_memory(script: str, names: Sequence[str], *options: str, times: int = 1) -> dict[str, int]:
    """Peak bytes of each contestant, each measured by ``script --peak NAME`` in a process of its own; of several
    `times` the median, as what the allocator held before differs from process to process."""

    def peak(name: str) -> int:
        command = [sys.executable, script, "--peak", name, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    return {name: int(statistics.median(peak(name) for _ in range(times))) for name in names}


def peak_of(contestant: Callable[[], Any]) -> int:
    """Bytes by which one call raises the resident size. Linux."""
    forget_peak()
    before = resident_memory()
    contestant()
    return process_peak() - before


def machine() -> dict[str, Any]:
    """What a timing depends on beside the code."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def save(name: str, record: Mapping[str, Any], sources: Sequence[str]) -> Path:
    """Write ``results/NAME.json``: the record with machine, command and the `code_hash` of the measured sources.

    Args:
        name: of the file.
        record: what was found.
        sources: files that were measured, relative to the repository.
    """
    hashes = {source: code_hash(ROOT / source) for source in sources}
    command = ["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]
    whole = {"command": " ".join(command), "machine": machine(), "sources": hashes, **record}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return path


def table(timing: Mapping[str, Any], peaks: Mapping[str, int] | None = None) -> str:
    """The result of `compare`, with peaks if there are any, as text."""
    rows = [f"{'':<24} {'median':>10} {'min':>10} {'spread':>7} {'ratio':>6} {'±':>6} {'peak':>10}"]
    for name, row in timing["contestants"].items():
        peak = f"{peaks[name] / 2**20:7.0f} MiB" if peaks and name in peaks else ""
        rows.append(
            f"{name:<24} {row['median'] * 1e3:7.2f} ms {row['min'] * 1e3:7.2f} ms {row['spread']:7.1%} "
            f"{row['ratio']:6.3f} {row['ratio_spread']:6.1%} {peak:>10}"
            + (f"  void: spread above {VOID_ABOVE:.0%}, measure again on an idle machine" if row["void"] else "")
        )
    rows.append(f"threads {torch.get_num_threads()}, load {timing['load_before']:.2f} → {timing['load_after']:.2f}")
    return "\n".join(rows)
