"""Do a comparison: measure, tune, train, report. Whatever is there already is not done again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from ... import checkpoint
from ...errors import InputError, StorageError
from ...metrics.progress import duration
from ...recipe import Recipe
from ...report import analyse, write
from ..folder import make_folder, next_free, validation_curve, write_text
from ..train import interruptible
from .choices import Choice, check_choices, make_choices
from .equal import equal_memory, equal_steps
from .measuring import died, measure
from .record import gather, read_json
from .server import Server
from .study import Equal, RunPlace, Study, finals_of, grown, read_study, trials_of, write_study
from .tuning import Tune, best, next_value, reference_curve


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
    seeds: int = 1,
    tune: str | None = None,
    equal: Equal = "tokens",
    out: str | Path | None = None,
    parallel: int = 1,
    resume: bool = False,
    command: str = "",
    progress: TextIO | None = sys.stderr,
) -> Comparison:
    """Train the same recipe once per choice and seed, and report which is better.

    Args:
        recipe: a YAML file; or, to resume, the folder of a comparison.
        overrides: ``key=value``, for all choices.
        over: ``key=a,b,…``: what the choices differ in; several are combined each with each.
        seeds: how many runs of each choice count.
        tune: ``key=low:high`` or ``key=low:high:trials``: tuned for each choice, with a seed of its own.
        equal: what is held equal: tokens seen; training time, as measured; or memory: each choice may use as much as
            the one that needs most, and puts what it saves into a larger batch.
        out: folder; None takes the next free runs/compare-RECIPE-NUMBER.
        parallel: runs at a time. Time is measured before, and never in parallel.
        resume: go on with the comparison in `out` (or `recipe`, if that is its folder); choices and seeds may be added.
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
        if over or overrides or tune:
            raise InputError(f"{path} is a comparison: its question is known; give the recipe and --out to add choices")
        study, folder = read_study(path), path
    else:
        study = ask(path, overrides, over, seeds, tune, equal, parallel, command)
        folder = Path(out) if out is not None else next_free(f"compare-{study.name}")
    return answer(study, folder, parallel=parallel, resume=resume, progress=progress)


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
    trial = [] if tuned is None else [f"{tuned.key}={tuned.low!r}"]
    choices = make_choices(path, overrides, over, trial)
    if tuned is not None and any(tuned.key in c.changes for c in choices):
        raise InputError(f"{tuned.key!r} cannot be both compared and tuned")
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
        threads=first.settings.threads or (max(1, cores // parallel) if parallel > 1 else None),
    )


def answer(
    study: Study, folder: Path, *, parallel: int = 1, resume: bool = False, progress: TextIO | None = sys.stderr
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
    make_folder(folder)
    with checkpoint.lock(folder), interruptible() as interrupted:
        write_study(folder, study)
        work = Work(study, folder, progress, interrupted)
        work.measure()
        if interrupted() is None:
            work.check_room()
            work.train(parallel)
        report = analyse(gather(folder, study))
        write(folder, report)
    return Comparison(folder, report, interrupted())


class Work:
    """What one process does of a comparison."""

    def __init__(
        self, study: Study, folder: Path, progress: TextIO | None, interrupted: Callable[[], int | None]
    ) -> None:
        self.study, self.folder, self.progress, self.interrupted = study, folder, progress, interrupted
        self.measured: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, list[str]] = {}
        self._failed = threading.Event()
        self._printing = threading.Lock()

    def say(self, text: str) -> None:
        if self.progress is not None:
            with self._printing:
                print(text, file=self.progress, flush=True)

    def measure(self) -> None:
        """Memory and time of every choice, and with them what makes the choices equal; a void time is taken again."""
        make_folder(self.folder / "measured")
        places = {c.label: self.folder / "measured" / f"{c.folder}.json" for c in self.study.choices}
        recipes = {c.label: self.variant(c) for c in self.study.choices if c.recipe is not None}
        settings = read_json(self.folder / "equal.json")
        if self.study.equal == "memory" and not settings:
            self.say("measuring how many rows each choice can take in equal memory")
            settings = equal_memory(recipes, self.stopping)
        self.fill_caches([recipe for label, recipe in recipes.items() if not places[label].exists()])
        known = {label: found for label in recipes if (found := read_json(places[label]))}
        self.measured = {label: m for label, m in known.items() if not m.get("time", {}).get("void")}
        if len(self.measured) < len(recipes):
            self.say("measuring memory, and the time of a step in turns with the first choice's")

        def keep(label: str, found: dict[str, Any]) -> None:
            self.measured[label] = found
            write_text(places[label], json.dumps(found, indent=1) + "\n")
            self.say(f"  {label}: {told(found)}")

        widened = {c.label: self.variant(c, *settings.get(c.label, [])) for c in self.study.choices if c.recipe}
        measure(recipes if self.study.equal != "memory" else widened, dict(self.measured), keep, self.stopping)
        if self.stopping():
            return
        if self.study.equal != "memory":
            settings = equal_steps(recipes, self.measured, self.study.equal == "time") | settings
        write_text(self.folder / "equal.json", json.dumps(settings, indent=1) + "\n")
        self.settings = settings

    def fill_caches(self, recipes: Sequence[Recipe]) -> None:
        """Tokenize and convert beforehand, so that none of it counts as a choice's memory."""
        server = Server()
        distinct = {json.dumps([r.data.to_mapping(), r.model.to_mapping()]): r for r in recipes}
        for recipe in distinct.values():
            if not self.stopping():
                server({"recipe": recipe.to_yaml(), "name": recipe.name, "log": os.devnull})  # an error comes again
        server.close()

    def check_room(self) -> None:
        """Refuse what the disk cannot hold: every run that counts keeps its last checkpoint.

        Raises:
            InputError: it does not fit.
        """
        sizes = [m["memory"]["weights"] + m["memory"]["optimizer"] for m in self.measured.values() if "memory" in m]
        need = len(self.study.seeds) * sum(sizes) + max(sizes, default=0)  # a new one is whole before an old one goes
        files = [f for f in (self.folder / "runs").rglob("*") if f.is_file() and not f.is_symlink()]
        free = shutil.disk_usage(self.folder).free
        if need - sum(f.stat().st_size for f in files) > free:
            raise InputError(
                f"{self.folder}: the runs' checkpoints need {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
            )

    def train(self, parallel: int) -> None:
        """All trials and runs that are not there yet: one choice after another, or several at a time.

        Raises:
            StorageError: the disk refused; the other runs were interrupted and saved.
        """
        todo = [c for c in self.study.choices if c.recipe is not None and "error" not in self.measured.get(c.label, {})]
        servers = [Server() for _ in range(min(parallel, len(todo)))]
        free: SimpleQueue[Server] = SimpleQueue()
        for server in servers:
            free.put(server)

        def one(choice: Choice) -> None:
            server = free.get()
            try:
                self.choice(choice, server)
            except BaseException:
                self._failed.set()
                raise
            finally:
                free.put(server)

        if not todo:
            return
        with ThreadPoolExecutor(len(servers)) as pool:
            futures = [pool.submit(one, c) for c in todo]
            try:
                while wait(futures, timeout=0.2).not_done and not self.stopping():
                    pass
            finally:  # a second Ctrl-C comes through here as well
                self._failed.set()
                while wait(futures, timeout=0.2).not_done:
                    for server in servers:
                        server.signal(signal.SIGTERM)
        for server in servers:
            server.close()
        for future in futures:
            future.result()

    def choice(self, choice: Choice, server: Server) -> None:
        """The trials of a choice and its runs that count."""
        settings = self.settings.get(choice.label, [])
        try:
            if self.study.tune is not None:
                value = self.tune(choice, self.study.tune, settings, server)
                if value is None:
                    return
                settings = [*settings, f"{self.study.tune.key}={value!r}"]
            for place in finals_of(self.folder, choice, self.study.seeds):
                if not self.stopping() and not ended(place):
                    self.run(place, self.variant(choice, *settings, f"seed={place.seed}"), None, server)
        except InputError as error:  # a schedule that does not fit the steps, say
            self.say(f"{choice.label}: {error}")
            write_text(self.folder / "measured" / f"{choice.folder}.json", json.dumps({"error": str(error)}) + "\n")

    def tune(self, choice: Choice, tune: Tune, settings: list[str], server: Server) -> float | None:
        """Do the trials that are missing: the best value, None when there is none or the work is to stop."""
        while True:
            places = trials_of(self.folder, choice, tune, self.study.trial_seed)
            ends = {value: place.read() or {} for value, place in places.items() if ended(place)}
            tried = {value: end.get("loss") if end["status"] == "done" else None for value, end in ends.items()}
            value = next_value(tune, tried)
            if value is None:
                return best(tried)
            if self.stopping():
                return None
            place = RunPlace(self.folder, choice, "trial", self.study.trial_seed, value)
            try:
                recipe = self.variant(choice, *settings, f"{tune.key}={value!r}", f"seed={place.seed}")
            except InputError as error:  # beyond what the option allows
                make_folder(place.out.parent)
                write_text(place.outcome, json.dumps({"status": "failed", "error": str(error)}) + "\n")
                continue
            curves = [(tried[v], validation_curve(places[v].out)) for v in tried]
            self.run(place, recipe, reference_curve(curves), server)

    def run(self, place: RunPlace, recipe: Recipe, reference: Mapping[int, float] | None, server: Server) -> None:
        """One run, from where it stands.

        Raises:
            StorageError: the disk refused.
        """
        make_folder(place.out.parent)
        recipe = Recipe.parse(recipe.to_yaml(), f"out={json.dumps(str(place.out))}", name=recipe.name)
        paths = {"outcome": str(place.outcome), "log": str(place.log)}
        code = server({"recipe": recipe.to_yaml(), "name": recipe.name, "reference": reference, **paths})
        if code == StorageError.exit_code:
            raise StorageError(last_line(place.log).removeprefix("fallline: error: "))
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) or (code < 0 and self.stopping()):
            return
        end = place.read()
        if end is None or code < 0:
            end = {"status": "died", "error": died(code) if code < 0 else last_line(place.log)}
            write_text(place.outcome, json.dumps(end) + "\n")
        if place.kind == "trial":
            shutil.rmtree(place.out / "checkpoints", ignore_errors=True)
            (place.out / "model").unlink(missing_ok=True)
        self.say(f"{title(place, self.study.tune)}: {told_end(end)}")

    def variant(self, choice: Choice, *more: str) -> Recipe:
        """The choice's recipe as the comparison runs it."""
        assert choice.recipe is not None
        threads = [] if self.study.threads is None else [f"threads={self.study.threads}"]
        own = ("sample=0", "tracker=null", "out=null")
        return Recipe.parse(choice.recipe.to_yaml(), *own, *threads, *more, name=self.study.name)

    def stopping(self) -> bool:
        """Whether to begin nothing new."""
        return self.interrupted() is not None or self._failed.is_set()


def ended(place: RunPlace) -> bool:
    """Whether a run needs nothing more; one that died may do better another time."""
    end = place.read()
    return end is not None and end["status"] != "died"


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1] if lines else "it said nothing"


def title(place: RunPlace, tune: Tune | None) -> str:
    """A run in words."""
    if place.kind == "trial" and tune is not None:
        return f"{place.choice.label}  trial {tune.key}={place.value:g}"
    return f"{place.choice.label}  seed {place.seed}"


def told_end(end: Mapping[str, Any]) -> str:
    """An outcome in words."""
    if end.get("loss") is None:
        return f"{end['status']}: {end['error']}"
    text = f"validation loss {end['loss']:.4f} after {end['steps']} steps ({duration(end['seconds'])})"
    return text if end["status"] == "done" else f"{text}, given up: {end['error']}"


def told(found: Mapping[str, Any]) -> str:
    """A measurement in words."""
    if "error" in found:
        return f"cannot be measured: {found['error']}"
    time, memory = found["time"], found["memory"]
    text = f"peak {memory['peak'] / 2**20:.0f} MiB, {1e3 * time['step']:.1f} ms a step"
    if time["ratio"] != 1:
        text += f", {time['ratio']:.2f} ± {time['ratio_spread']:.0%} of {time['to']}'s"
    return text + (" (void: the machine was too busy)" if time["void"] else "")
