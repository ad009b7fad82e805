"""Where the time of a run goes, and the most memory it needed."""

from __future__ import annotations

import resource
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

RATES = ("tokens_per_second", "mfu")
"""What the metrics file has beside seconds under ``time``."""


class Clock:
    """Books seconds by phase: `with clock("forward"): …`.

    A phase inside another stops the outer one, so that the phases of `read` add up to at most the time that passed.
    On CUDA, events mark the borders and nothing waits for the device before `read`; elsewhere it is `perf_counter`.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._device = torch.device(device)
        self._phases: dict[str, _Phase] = {}
        self._open: list[str] = []
        self._mark: Any = None  # when the innermost open phase began, or went on
        self._seconds: dict[str, float] = {}
        self._spans: list[tuple[str, Any, Any]] = []  # CUDA: phase, first and last event

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        found = self._phases.get(phase)
        if found is None:
            found = self._phases[phase] = _Phase(self, phase)
        return found

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last `read`; waits for a CUDA device."""
        if self._open:
            self._turn()
        if self._spans:
            torch.cuda.synchronize(self._device)
            for phase, start, stop in self._spans:
                self._seconds[phase] = self._seconds.get(phase, 0.0) + start.elapsed_time(stop) / 1000
            self._spans = []
        found, self._seconds = self._seconds, {}
        return found

    def _turn(self) -> None:
        """Book the time since the last border to the innermost open phase; here is a new border."""
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self._device))
            if self._open:
                self._spans.append((self._open[-1], self._mark, now))
            self._mark = now
        else:
            time = perf_counter()
            if self._open:
                phase = self._open[-1]
                self._seconds[phase] = self._seconds.get(phase, 0.0) + time - self._mark
            self._mark = time


class _Phase(AbstractContextManager[None]):
    """One phase of a clock, entered any number of times."""

    __slots__ = ("_clock", "_name")

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock._turn()
        self._clock._open.append(self._name)

    def __exit__(self, *_: object) -> None:
        self._clock._turn()
        self._clock._open.pop()


def peak_memory(device: torch.device | str = "cpu") -> int:
    """The most memory used so far, bytes: allocated by torch on a CUDA device, else resident of this process.

    Linux keeps the largest value of the process in ``/proc``; what `getrusage` says there includes the parent's size
    from before this program was started.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def resident_memory() -> int:
    """What of this process is in memory now, bytes; where the system does not say, its peak."""
    return _status("VmRSS") or peak_memory()


def _status(field: str) -> int:
    """Bytes in a line of Linux's table of this process; 0 on other systems."""
    table = Path("/proc/self/status")
    rows = table.read_text().splitlines() if table.exists() else []
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{field}:")), 0)
