"""Runs of `fallline` in child processes that can be killed.

Starting Python with torch takes seconds, and the tests that kill a training run do it dozens of times; so the children
are forked from the server that conftest.py has everything imported in.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fallline import checkpoint


@dataclass
class Ended:
    """How a child process ended: its exit code, negative for a signal, and what it printed."""

    code: int
    output: str


def records(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "memory")} for line in lines]


def same_end(killed: Path, whole: Path) -> None:
    """Both runs have the same records, and the same state to the bit."""
    assert records(killed) == records(whole)
    state = [checkpoint.find(out)[-1].path / "state.safetensors" for out in (whole, killed)]
    assert state[0].read_bytes() == state[1].read_bytes()


class Launcher:
    """Runs `fallline` in child processes."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"

    def __call__(
        self,
        *argv: str,
        die_at: tuple[str, int] | None = None,
        signal_after: tuple[int, float] | None = None,
        signal_when: tuple[int, Path] | None = None,
    ) -> Ended:
        """Run to the end, or to its death.

        Args:
            argv: of the command line.
            die_at: kill it at this checkpoint write point, at its n-th occurrence.
            signal_after: send this signal after so many seconds.
            signal_when: send this signal as soon as this file exists.
        """
        from launched import run  # imports torch

        self.log.unlink(missing_ok=True)
        child = multiprocessing.get_context("forkserver").Process(target=run, args=(argv, die_at, str(self.log)))
        child.start()
        assert child.pid is not None
        if signal_after is not None:
            time.sleep(signal_after[1])
            with contextlib.suppress(ProcessLookupError):  # it was done already
                os.kill(child.pid, signal_after[0])
        if signal_when is not None:
            while not signal_when[1].exists():
                time.sleep(0.01)
            os.kill(child.pid, signal_when[0])
        child.join()
        assert child.exitcode is not None
        return Ended(child.exitcode, self.log.read_text() if self.log.exists() else "")
