"""What one process does of a comparison: measure, tune, train. Whatever is there already is not done again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self, TextIO, TypeVar

import torch

from ...errors import InputError, StorageError
from ...metrics.progress import duration
from ...recipe import Recipe
from ..folder import make_folder, validation_curve, write_text
from ..plan.check import at_hand, size
from ..setting import pick_device
from .choices import Choice
from .equal import equal_memory, equal_steps
from .measuring import died, measure
from .record import read_json
from .server import Server
from .study import RunPlace, Study, finals_of, trials_of
from .tuning import Tune, best, next_value, reference_curve

T = TypeVar("T")


class Work:
    """What one process does of a comparison."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        parallel: int,
        force: bool,
        progress: TextIO | None,
        interrupted: Callable[[], int | None],
    ) -> None:
        self.study, self.folder, self.progress, self.interrupted = study, folder, progress, interrupted
        self.force = force
        self.servers = [Server() for _ in range(parallel)]
        self.measured: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, list[str]] = {}
        self._failed = threading.Event()
        self._printing = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.close()

    def say(self, text: str) -> None:
        if self.progress is not None:
            with self._printing:
                print(text, file=self.progress, flush=True)

    def tidy(self) -> None:
        """Let what failed be tried again (a run that diverged would do so again), and finish what a kill left."""
        for path in [*(self.folder / "runs").glob("*/*.json"), *(self.folder / "measured").glob("*.json")]:
            end = read_json(path)
            if end.get("status") in ("failed", "died") or (path.parent.name == "measured" and "error" in end):
                path.unlink()
            elif path.name.startswith("trial-"):
                drop_weights(path.with_suffix(""))

    def measure(self) -> None:
        """Memory and time of every choice, and with them what makes the choices equal; a void time is taken again."""
        make_folder(self.folder / "measured")
        places = {c.label: self.folder / "measured" / f"{c.folder}.json" for c in self.study.choices}
        low = [] if self.study.tune is None else [f"{self.study.tune.key}={self.study.tune.low!r}"]  # will not diverge
        recipes = {c.label: self.variant(c, *low) for c in self.study.choices if c.recipe is not None}
        self.fill_caches([recipe for label, recipe in recipes.items() if not places[label].exists()])
        equal = read_json(self.folder / "equal.json")
        self.settings = equal.get("settings", {})
        if self.study.equal == "memory":
            if not self.settings:
                self.say("measuring how many rows each choice can take in equal memory")
                self.settings = equal_memory(recipes, self.stopping)
            choices = {c.label: c for c in self.study.choices}
            recipes = {label: self.variant(choices[label], *low, *self.settings.get(label, [])) for label in recipes}
        known = {label: found for label in recipes if (found := read_json(places[label]))}
        self.measured = {label: m for label, m in known.items() if not m.get("time", {"void": True})["void"]}
        if len(self.measured) < len(recipes):
            self.say("measuring memory, and the time of a step in turns with the first choice's")

        def keep(label: str, found: dict[str, Any]) -> None:
            self.measured[label] = found
            write_text(places[label], json.dumps(found, indent=1) + "\n")
            self.say(f"  {label}: {told(found)}")

        if not self.stopping():
            measure(recipes, dict(self.measured), keep, self.stopping, self.force)
        if self.stopping():
            return
        void = equal.get("void", [])
        if self.study.equal != "memory":
            found = equal_steps(recipes, self.measured, self.study.equal == "time")
            if self.study.equal == "time":
                times = {label: self.measured[label]["time"] for label in found if label not in self.settings}
                void = [*void, *(label for label, time in times.items() if time["void"])]
            self.settings = found | self.settings
        text = json.dumps({"settings": self.settings, "void": void}, indent=1)
        write_text(self.folder / "equal.json", text + "\n")

    def fill_caches(self, recipes: Sequence[Recipe]) -> None:
        """Tokenize and convert beforehand, so that none of it counts as a choice's memory."""
        distinct = {json.dumps([r.data.to_mapping(), r.model.to_mapping()]): r for r in recipes}

        def fill(recipe: Recipe, server: Server) -> None:
            if not self.stopping():
                job = {"recipe": recipe.to_yaml(), "name": recipe.name, "force": self.force, "log": os.devnull}
                server(job)  # an error comes again

        self.spread(fill, list(distinct.values()))

    def check_room(self) -> None:
        """Refuse what the disk cannot hold: every run that counts keeps its last checkpoint.

        Raises:
            InputError: it does not fit.
        """
        sizes = [m["memory"]["saved"] for m in self.measured.values() if "memory" in m]
        need = len(self.study.seeds) * sum(sizes) + max(sizes, default=0)  # a new one is whole before an old one goes
        files = [f for f in (self.folder / "runs").rglob("*") if f.is_file() and not f.is_symlink()]
        free = shutil.disk_usage(self.folder).free
        if need - sum(f.stat().st_size for f in files) > free:
            raise InputError(
                f"{self.folder}: the runs' checkpoints need {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
            )

    def check_memory(self) -> None:
        """Refuse more runs at a time than the memory at hand holds, by what each choice was measured to take.

        Raises:
            InputError: it does not hold the largest of them together.
        """
        taken: dict[torch.device, list[int]] = {}
        for choice in self.study.choices:
            found = self.measured.get(choice.label, {}).get("memory")
            left = any(place.read() is None for place in finals_of(self.folder, choice, self.study.seeds))
            if choice.recipe is not None and found is not None and left:
                taken.setdefault(pick_device(choice.recipe.settings.device), []).append(found["peak"])
        for device, peaks in taken.items():
            largest = sorted(peaks, reverse=True)[: len(self.servers)]  # a choice's own runs come one after another
            free = at_hand(device)
            if self.force or len(largest) < 2 or free is None or sum(largest) <= free:
                continue
            fit = max(n for n in range(1, len(largest)) if n == 1 or sum(largest[:n]) <= free)
            raise InputError(
                f"the largest {len(largest)} choices take {size(sum(largest))} together and {size(free)} of memory are "
                f"free; go on with fewer runs at a time: fallline compare {self.folder} --resume --parallel {fit}; "
                "--force runs them all the same"
            )

    def train(self) -> None:
        """All trials and runs that are not there yet: one choice after another, or several at a time.

        Raises:
            StorageError: the disk refused; the other runs were interrupted and saved.
        """
        todo = [c for c in self.study.choices if c.recipe is not None and "error" not in self.measured.get(c.label, {})]
        self.spread(self.choice, todo)

    def spread(self, work: Callable[[T, Server], None], items: Sequence[T]) -> None:
        """Do pieces of work in order, on as many servers as there are; what interrupts us interrupts their runs."""
        free: SimpleQueue[Server] = SimpleQueue()
        for server in self.servers:
            free.put(server)

        def one(item: T) -> None:
            server = free.get()
            try:
                work(item, server)
            except BaseException:
                self._failed.set()
                raise
            finally:
                free.put(server)

        with ThreadPoolExecutor(len(self.servers)) as pool:
            futures = [pool.submit(one, item) for item in items]
            try:
                while wait(futures, timeout=0.2).not_done and not self.stopping():
                    pass
            except BaseException:  # a second Ctrl-C
                self._failed.set()
                raise
            finally:
                while wait(futures, timeout=0.2).not_done:
                    for server in self.servers:
                        server.signal(signal.SIGTERM)
        for future in futures:
            future.result()

    def choice(self, choice: Choice, server: Server) -> None:
        """The trials of a choice and its runs that count."""
        settings = self.settings.get(choice.label, [])
        try:
            if self.study.tune is not None:
                value = self.tuned(choice, self.study.tune, settings, server)
                if value is None:
                    return
                settings = [*settings, f"{self.study.tune.key}={value!r}"]
            for place in finals_of(self.folder, choice, self.study.seeds):
                if not self.stopping() and place.read() is None:
                    self.run(place, self.variant(choice, *settings, f"seed={place.seed}"), None, server)
        except InputError as error:  # a schedule that does not fit the steps, say
            self.say(f"{choice.label}: {error}")
            write_text(self.folder / "measured" / f"{choice.folder}.json", json.dumps({"error": str(error)}) + "\n")

    def tuned(self, choice: Choice, tune: Tune, settings: list[str], server: Server) -> float | None:
        """The best value, found once: a trial that is tried again later changes nothing that was run with it."""
        frozen = self.folder / "runs" / choice.folder / "tuned.json"
        value: float | None = read_json(frozen).get("value")
        if value is None:
            value = self.tune(choice, tune, settings, server)
            if value is not None:
                write_text(frozen, json.dumps({"value": value}) + "\n")
        return value

    def tune(self, choice: Choice, tune: Tune, settings: list[str], server: Server) -> float | None:
        """Do the trials that are missing: the best value, None when there is none or the work is to stop."""
        while True:
            places = trials_of(self.folder, choice, tune, self.study.trial_seed)
            ends = {value: end for value, place in places.items() if (end := place.read()) is not None}
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
            drop_weights(place.out)
        self.say(f"{title(place, self.study.tune)}: {told_end(end)}")

    def variant(self, choice: Choice, *more: str) -> Recipe:
        """The choice's recipe as the comparison runs it."""
        assert choice.recipe is not None
        free = self.study.threads is not None and choice.recipe.settings.threads is None
        threads = [f"threads={self.study.threads}"] if free else []
        own = ["sample=0", "tracker=null", "out=null"]
        if choice.recipe.checkpoint.every:
            own += ["checkpoint.keep=1", "checkpoint.best=false"]
        return Recipe.parse(choice.recipe.to_yaml(), *own, *threads, *more, name=self.study.name)

    def stopping(self) -> bool:
        """Whether to begin nothing new."""
        return self.interrupted() is not None or self._failed.is_set()


def drop_weights(out: Path) -> None:
    """Leave of a run its record and metrics."""
    (out / "model").unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


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
    text = f"peak {found['memory']['peak'] / 2**20:.0f} MiB"
    if "time" not in found:
        return f"{text}, failed while it was timed"
    time = found["time"]
    text += f", {1e3 * time['step']:.1f} ms a step"
    if time["interleaved"] and time["ratio"] != 1:
        text += f", {time['ratio']:.2f} ± {time['ratio_spread']:.0%} of {time['to']}'s"
    return text + (" (void: the machine was too busy)" if time["void"] else "")
