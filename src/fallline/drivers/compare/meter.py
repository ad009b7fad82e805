"""The process that measures one choice: memory and the seconds of a step, on demand.

`python -m fallline.drivers.compare.meter` reads a recipe as JSON ``{"recipe": …, "force": …}`` from its input, builds
the run, warms up, and answers with its memory. For every further line, a number of steps, it takes them and answers
with their seconds. It ends with its input, in the middle of a step if need be: whoever asked is gone then.

Memory is what the process has above its state after import: on a CPU its resident size, whose highest value is set
back once the parts are built, so that reading the data does not count; on CUDA what torch's allocator gave out.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch

from ...errors import FalllineError
from ...metrics import peak_memory, resident_memory
from ...recipe import Recipe
from ...step import Run, take_step
from ..allocator import trim
from ..evaluation import evaluate
from ..setting import build
from ..train import state_bytes
from .worker import MODELLING

WARMUP = 2


def meter(asked: TextIO, answers: TextIO) -> None:
    """Answer every line of `asked`."""

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    import_module(MODELLING)
    base = resident_memory()
    try:
        question = json.loads(asked.readline())
        setting = build(Recipe.parse(question["recipe"]), check_memory=True, force=question["force"])
        on_cpu = setting.run.device.type == "cpu"
        setting.run.setup()
        if on_cpu:
            forget_peak()
        else:
            torch.cuda.reset_peak_memory_stats(setting.run.device)
        first = [int(take_step(setting.run)["tokens"]) for _ in range(WARMUP)]
        evaluate(setting.run, setting.dataset.validation, setting.recipe.eval.rows)
        peak = peak_memory(setting.run.device) - (base if on_cpu else 0)
        about = {"record": setting.record, "threads": torch.get_num_threads()}
        answer(tokens=first[-1], memory=split(setting.run, peak), **about)
        for line in asked:
            setting.clock.read()
            start = time.perf_counter()
            for _ in range(int(line)):
                take_step(setting.run)
            phases = setting.clock.read()  # waits for the device
            answer(seconds=time.perf_counter() - start, phases=phases)
    except FalllineError as error:
        answer(error=str(error))
    except (RuntimeError, MemoryError) as error:  # torch says out of memory so
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])


def end_with(fd: int) -> None:
    """End this process as soon as nobody holds the other end of a pipe: a killed comparison cannot end its meters."""

    def watch() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLHUP)
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def forget_peak() -> None:
    """Let the highest resident size begin anew; where the system does not offer it, building the parts counts too."""
    trim()  # what reading the data has left behind
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def split(run: Run, peak: int) -> dict[str, Any]:
    """Peak bytes, and what weights, gradients and optimizer state have of them; the rest is activations, workspace,
    buffers of the allocator and the rows of data that were read. `saved`: what a checkpoint holds."""
    weights = sum(t.numel() * t.element_size() for t in (*run.model.parameters(), *run.model.buffers()))
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in run.trainable().values() if p.grad is not None)
    optimizer = state_bytes(run.optimizer)
    given = sum(p.numel() * p.element_size() for name, p in run.model.named_parameters() if name in run.given)
    return {
        "kind": "resident" if run.device.type == "cpu" else "allocated",
        "peak": peak,
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "saved": weights - given + optimizer,
        "rest": peak - weights - gradients - optimizer,
    }


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's chatter is not an answer
    end_with(0)
    meter(sys.stdin, out)
