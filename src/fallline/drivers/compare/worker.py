"""Processes of a comparison: each run is trained in one of its own.

`python -m fallline.drivers.compare.worker` imports everything once and forks a child per run, so that a run starts in
milliseconds; nothing is computed before the fork but hashes of code. Jobs come as JSON lines on its input; for each it
answers ``{"pid": …}`` and then ``{"code": …}``, negative for the signal that ended the child.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ... import checkpoint
from ...catalog import find
from ...errors import FalllineError, InputError, NonFiniteError, StorageError
from ...metrics import RATES
from ...recipe import WORDS, Recipe
from ..folder import validation_curve, write_text
from ..setting import build
from ..train import train
from .tuning import is_lost

MODELLING = "transformers.models.llama.modeling_llama"
"""What 🤗 Transformers imports when it builds most models; it takes seconds and a hundred megabytes."""

LOST = "clearly behind the best trial"


def run_job(job: Mapping[str, Any]) -> int:
    """Train, or go on training, and write the outcome beside the run's folder.

    Args:
        job: ``recipe``, YAML with `out`; ``name``; ``outcome``, path of what is written; ``reference``, step →
            validation loss of the trial to compare with, or None for a run that is not to be given up.

    Returns:
        The exit code that `fallline train` would have.
    """
    recipe = Recipe.parse(job["recipe"], name=job["name"])
    out, steps = Path(str(recipe.settings.out)), recipe.settings.steps
    wait_for(out)
    reference = None if job["reference"] is None else {int(k): v for k, v in job["reference"].items()}
    resume = (out / "run.json").is_file()
    losses = validation_curve(out) if resume else {}

    def watch(record: Mapping[str, Any]) -> str:
        if abandoned():
            os.kill(os.getpid(), signal.SIGTERM)  # the run is saved and can go on
        if reference is None or "val_loss" not in record:
            return ""
        losses[record["step"]] = record["val_loss"]
        return LOST if is_lost(record["step"], steps, record["val_loss"], losses[0], reference) else ""

    code = 0
    try:
        result = train(recipe, resume=resume, force=True, progress=None, watch=watch)  # it was measured
        if result.signal is not None:
            return 128 + result.signal
        times = [record.get("time", {}) for record in result.metrics]
        outcome = {
            "status": "lost" if result.run.stopped == LOST else "done",
            "loss": result.validation_loss if math.isfinite(result.validation_loss) else None,
            "error": result.run.stopped or None,
            "steps": result.run.step,
            "sources": method_sources(recipe),
            "seconds": sum(s for time in times for phase, s in time.items() if phase not in RATES),
        }
    except StorageError as error:
        print(f"fallline: error: {error}", file=sys.stderr)
        return error.exit_code
    except FalllineError as error:
        code = error.exit_code
        status = "diverged" if isinstance(error, NonFiniteError) else "failed"
        outcome = {"status": status, "error": str(error), "sources": method_sources(recipe)}
    except Exception as error:
        traceback.print_exc()
        code = 1
        outcome = {"status": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    write_text(Path(job["outcome"]), json.dumps(outcome, indent=1) + "\n")
    return code


def wait_for(out: Path, seconds: float = 60.0) -> None:
    """Wait for whoever holds a run's folder: a killed comparison's run needs a moment to see that it is abandoned."""
    end = time.monotonic() + seconds
    while out.is_dir() and time.monotonic() < end:
        try:
            with checkpoint.lock(out):
                return
        except InputError:
            time.sleep(0.1)


def method_sources(recipe: Recipe) -> dict[str, str]:
    """The files of the methods that a recipe picks, with the hash of their code."""
    chosen = ((kind, getattr(recipe, kind).id) for kind in WORDS)
    return {path: code for kind, id in chosen for path, code in sources_of(kind, id).items()}


@cache
def sources_of(kind: str, id: str) -> dict[str, str]:
    """Those of one method; hashed once, as the code is imported once."""
    return find(kind, id).sources()


def fill_caches(job: Mapping[str, Any]) -> int:
    """Build what a recipe needs and forget it again: texts are tokenized and models converted only once."""
    try:
        build(Recipe.parse(job["recipe"], name=job["name"]), check_memory=not job["force"])
    except FalllineError as error:
        print(f"fallline: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def abandoned() -> bool:
    """Whether the process that asked for the run is gone: nobody holds the other end of our input."""
    poll = select.poll()
    poll.register(0, select.POLLHUP)
    return bool(poll.poll(0))


def serve() -> None:
    """Do jobs one after another until the input ends."""
    import_module(MODELLING)
    for line in sys.stdin:
        job = json.loads(line)
        with suppress(Exception):  # what is wrong the child will tell
            method_sources(Recipe.parse(job["recipe"], name=job["name"]))  # imports its methods, for all runs to come
        pid = os.fork()
        if pid == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(run_job(job) if "outcome" in job else fill_caches(job))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    serve()
