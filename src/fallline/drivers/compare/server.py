"""The comparison's side of a worker: hand over a job, wait for its end, pass a signal on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


class Server:
    """Trains one run at a time in processes of their own; see `fallline.drivers.compare.worker`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._pid = 0
        self._told = 0
        self._lock = threading.Lock()  # between the end of a child and a signal to it

    def __call__(self, job: Mapping[str, Any]) -> int:
        """Do a job: its exit code, negative for the signal that ended it."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fallline.drivers.compare.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the comparison, which passes it on
            )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the missing answer will tell
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        with self._lock:
            self._pid = self._answer("pid")
        code = self._answer("code") if self._pid else self._lost()
        with self._lock:
            self._pid = 0
        return code

    def _lost(self) -> int:
        """How the process ended that should have answered; the next job gets another."""
        assert self._process is not None
        code, self._process = self._process.wait(), None
        return code if code < 0 else -signal.SIGKILL

    def _answer(self, key: str) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return int(json.loads(line)[key])
        return 0 if key == "pid" else self._lost()

    def signal(self, number: int) -> None:
        """Send a signal to the run that is going on, if there is one; only once, as a second one would kill it."""
        with self._lock, suppress(ProcessLookupError):
            if self._pid and self._pid != self._told:
                self._told = self._pid
                os.kill(self._pid, number)

    def close(self) -> None:
        """End the process, and the run if there is one."""
        self.signal(signal.SIGTERM)
        if self._process is not None:
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
