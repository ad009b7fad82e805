"""Do a comparison: from the question to the report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ... import checkpoint
from ...errors import InputError, StorageError
from ...report import analyse, write
from ..folder import make_folder, next_free
from ..train import interruptible
from .choices import OWN, check_choices, make_choices, sets
from .record import gather
from .study import Equal, Study, grown, read_study, write_study
from .tuning import Tune
from .work import Work


@dataclass
class Comparison:
    """What a finished or interrupted comparison leaves.

    Attributes:
        out: its folder; `report.html`, `report.json` and `report.csv` are in it.
        report: the content of `report.json`.
        signal: the signal that interrupted it, or None.
    """

    out: Path
    report: dict[str, Any]
    signal: int | None = None


def compare(
    recipe: str | Path,
    *overrides: str,
    over: Sequence[str] = (),
    seeds: int | None = None,
    tune: str | None = None,
    equal: Equal | None = None,
    out: str | Path | None = None,
    parallel: int = 1,
    resume: bool = False,
    force: bool = False,
    command: str = "",
    progress: TextIO | None = sys.stderr,
) -> Comparison:
    """Train the same recipe once per choice and seed, and report which is better.

    Args:
        recipe: a YAML file; or, to resume, the folder of a comparison.
        overrides: ``key=value``, for all choices.
        over: ``key=a,b,…``: what the choices differ in; several are combined each with each.
        seeds: how many runs of each choice count; None: one.
        tune: ``key=low:high`` or ``key=low:high:trials``: tuned for each choice, with a seed of its own.
        equal: what is held equal: ``tokens`` seen, also when None; training ``time``, as measured; or ``memory``: each
            choice may use as much as the one that needs most, and puts what it saves into a larger batch.
        out: folder; None takes the next free runs/compare-RECIPE-NUMBER.
        parallel: runs at a time. Time is measured before, and never in parallel.
        resume: go on with the comparison in `out` (or `recipe`, if that is its folder); choices and seeds may be added.
        force: measure and run even what memory will not suffice for.
        command: to quote in the report.
        progress: where to tell what goes on; None tells nothing.

    Raises:
        InputError: bad input; nothing was changed.
        StorageError: the disk refused; what was done is kept, and can be resumed.
    """
    path = Path(recipe)
    if (path / "study.json").is_file():
        if not resume:
            raise InputError(f"{path} already holds a comparison; add --resume to continue it")
        if over or overrides or tune or seeds is not None or equal is not None or out is not None:
            raise InputError(
                f"{path} holds the question already; to add choices or seeds give the recipe and --out {path}"
            )
        study, folder = read_study(path), path
    else:
        study = ask(path, overrides, over, 1 if seeds is None else seeds, tune, equal or "tokens", parallel, command)
        folder = Path(out) if out is not None else next_free(f"compare-{study.name}")
    return answer(study, folder, parallel=parallel, resume=resume, force=force, progress=progress)


def ask(
    path: Path,
    overrides: Sequence[str],
    over: Sequence[str],
    seeds: int,
    tune: str | None,
    equal: Equal,
    parallel: int,
    command: str,
) -> Study:
    """The question that the arguments of `compare` put."""
    if seeds < 1 or parallel < 1:
        raise InputError("--seeds and --parallel must be at least 1")
    for override in overrides:
        if override.split("=")[0] in ("out", "sample", "tracker"):
            raise InputError(
                f"{override.split('=')[0]!r} is the comparison's own business; leave it out (--out FOLDER)"
            )
    tuned = None if tune is None else Tune.parse(tune)
    trials = [] if tuned is None else [f"{tuned.key}={value!r}" for value in tuned.grid()]
    head = "" if tuned is None else tuned.key.partition(".")[0]
    if head in ("data", "eval", "objective"):
        raise InputError(f"--tune cannot be about {head!r}: trials are judged by their loss, which it would change")
    if head in ("steps", "batch", *OWN):
        raise InputError(f"--tune cannot be about {head!r}: it would change what is held equal, or nothing that counts")
    choices = make_choices(path, overrides, over, trials)
    if tuned is not None and any(sets(c.changes, tuned.key) for c in choices):
        raise InputError(f"{tuned.key!r} cannot be both compared and tuned")
    compared = {key for c in choices for key in c.changes}
    if equal == "time" and "steps" in compared:
        raise InputError("--equal time sets the steps; they cannot be what is compared")
    if equal == "memory" and compared & {"batch", "micro"}:
        raise InputError("--equal memory sets the rows in a step; batch and micro cannot be what is compared")
    first = next((c.recipe for c in choices if c.recipe is not None), None)
    if first is None:
        raise InputError(f"no choice can be run; the first because: {choices[0].error}")
    start = first.settings.seed
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Study(
        name=first.name,
        command=command,
        choices=tuple(choices),
        seeds=tuple(range(start + (tuned is not None), start + (tuned is not None) + seeds)),
        trial_seed=start,
        tune=tuned,
        equal=equal,
        threads=max(1, cores // parallel) if parallel > 1 else None,
    )


def answer(
    study: Study,
    folder: Path,
    *,
    parallel: int = 1,
    resume: bool = False,
    force: bool = False,
    progress: TextIO | None = sys.stderr,
) -> Comparison:
    """Do what a study asks, in its folder.

    Raises:
        InputError: the folder holds something else, or another question.
        StorageError: the disk refused; what was done is kept.
    """
    check_choices(study.choices)
    if (folder / "study.json").is_file():
        if not resume:
            raise InputError(
                f"{folder} already holds a comparison; add --resume to continue it, or choose another --out"
            )
        study = grown(read_study(folder), study)
    elif resume:
        raise InputError(f"nothing to resume in {folder}: it holds no comparison")
    elif folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
        raise InputError(f"{folder} is not empty and holds no comparison; choose another --out")
    free = any(c.recipe is not None and c.recipe.settings.threads is None for c in study.choices)
    if parallel > 1 and study.threads is None and free:
        raise InputError(
            f"{folder} was begun with one run at a time, on all cores: with --parallel {parallel} threads would change"
        )
    make_folder(folder)
    with checkpoint.lock(folder), interruptible() as interrupted:
        try:
            write_study(folder, study)
            with Work(study, folder, parallel, force, progress, interrupted) as work:
                work.tidy()
                work.measure()
                if interrupted() is None:
                    work.check_room()
                    work.check_memory()
                    work.train()
            report = analyse(gather(folder, study))
            write(folder, report)
        except OSError as error:
            more = f"make room and continue with: fallline compare {folder} --resume"
            raise StorageError(f"{error}; what was done is kept; {more}") from error
    return Comparison(folder, report, interrupted())
