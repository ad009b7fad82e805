"""C for loops that are slow as tensor operations, compiled where it runs.

A library is compiled anew in every process, which takes half a second, so that none is ever stale or of another
machine's processor. Where there is no C compiler the caller goes on without, as a warning says once: its tensor
operations and the loops agree to rounding, not to the bit.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from threading import Thread

import torch

FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC")

log = logging.getLogger("fallline")


@cache
def compiled(source: str) -> ctypes.CDLL | None:
    """The library of C source, or None where it cannot be compiled."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if not command or shutil.which(command[0]) is None:
        warn(shlex.join(command))
        return None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        target = Path(folder, "library.so")
        for tuned in (["-march=native"], []):
            call = [*command, *FLAGS, *tuned, "-x", "c", "-", "-o", str(target), "-lm"]
            try:
                subprocess.run(call, input=source.encode(), capture_output=True, check=True, timeout=120)
                return ctypes.CDLL(str(target))
            except (OSError, subprocess.SubprocessError):
                continue
    warn(shlex.join(command))
    return None


@cache
def warn(command: str) -> None:
    """Say, once, that there are no compiled loops."""
    log.warning(
        "cannot compile C with %r (CC sets the compiler): some optimizers take slower paths, which round differently",
        command,
    )


def in_parallel(tasks: Sequence[Callable[[], object]]) -> None:
    """Do all tasks, in as many threads as torch uses; for calls of C, during which Python lets others run.

    When it returns or raises no thread of its own is left. It raises the first error of a task; others are not begun.
    """
    waiting, failed = list(reversed(tasks)), list[BaseException]()

    def work() -> None:
        while True:
            try:
                task = waiting.pop()
            except IndexError:
                return
            try:
                task()
            except BaseException as error:  # to be raised by the caller's thread
                failed.append(error)
                waiting.clear()

    helpers = list[Thread]()
    try:
        for _ in range(min(torch.get_num_threads(), len(tasks)) - 1):
            helper = Thread(target=work)
            helper.start()
            helpers.append(helper)
        work()
    finally:
        waiting.clear()
        for helper in helpers:
            helper.join()
    if failed:
        raise failed[0]
