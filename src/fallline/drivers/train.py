"""Train: from a recipe to a run folder.

A run folder holds `recipe.yaml` (resolved), `run.json` (versions, hashes, machine), `metrics.jsonl` (a line a step),
`checkpoints/step-N/` and, when done, `model`, a link to the last checkpoint's 🤗 folder.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import checkpoint
from ..adapters import peft
from ..errors import StorageError
from ..generate import generate
from ..metrics import Metrics, Progress, Trackers, check_trackers, peak_memory, product_rate, token_flops, trackers
from ..noise import rng
from ..recipe import Recipe
from ..step import Run, take_step
from .evaluation import evaluation
from .folder import link_latest, link_model, make_folder, open_folder, run_folder
from .setting import Setting, build


@dataclass
class Result:
    """What a finished or interrupted run leaves.

    Attributes:
        out: the run folder.
        run: the parts, as they are after the last step.
        metrics: the records of metrics.jsonl.
        sample: generated text, empty when none was asked for or the run was interrupted.
        signal: the signal that interrupted the run, or None.
    """

    out: Path
    run: Run
    metrics: list[dict[str, Any]]
    sample: str = ""
    signal: int | None = None

    @property
    def validation_loss(self) -> float:
        """Of the last evaluation, nats per token."""
        return float([m["val_loss"] for m in self.metrics if "val_loss" in m][-1])


@contextmanager
def interruptible() -> Iterator[Callable[[], int | None]]:
    """Turn the first Ctrl-C or SIGTERM into an answer of the function this yields; a second one acts as usual."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    try:
        for polite in (signal.SIGINT, signal.SIGTERM):
            before[polite] = signal.signal(polite, note)
    except ValueError:  # not the main thread: signals are somebody else's business
        pass
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Watch = Callable[[Mapping[str, Any]], str]
"""Sees every record of the metrics file before it is written; a text it returns ends the run there, as the reason."""


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    force: bool = False,
    progress: TextIO | None = sys.stderr,
    watch: Watch | None = None,
) -> Result:
    """Do what a recipe says.

    Args:
        recipe: from `Recipe.load`.
        resume: continue the run in `recipe.settings.out` from its newest good checkpoint; the result is bit-identical
            to that of an uninterrupted run on the same machine, versions and thread count.
        force: begin even if memory will not suffice.
        progress: where to show progress; None shows nothing.
        watch: sees every record, and may end the run.

    Raises:
        InputError: bad input; nothing was changed.
        NonFiniteError: a loss or gradient was not finite; stopped before the update.
        StorageError: the disk refused; the last good checkpoint is named.
    """
    out = run_folder(recipe, resume)
    names = [recipe.settings.tracker] if recipe.settings.tracker else []
    check_trackers(names)
    setting = build(recipe, check_memory=True, force=force)
    make_folder(out)
    with checkpoint.lock(out), interruptible() as interrupted:
        saved = open_folder(setting, out, resume)
        link_latest(out)
        follow = trackers(names, out, recipe.to_mapping())
        with Metrics(out / "metrics.jsonl") as metrics:
            loop = Loop(setting, out, metrics, follow, progress, watch)
            loop.begin(saved)
            while not loop.done and interrupted() is None:
                loop.step()
            loop.end()
            result = Result(out, setting.run, metrics.read(), signal=interrupted())
        if loop.done:
            link_model(out)
            result.sample = sample(setting, recipe.settings.sample) if recipe.settings.sample else ""
        return result


class Loop:
    """The steps of one process's part of a run, and what is written between them."""

    def __init__(
        self,
        setting: Setting,
        out: Path,
        metrics: Metrics,
        follow: Trackers,
        progress: TextIO | None,
        watch: Watch | None = None,
    ) -> None:
        self.setting, self.recipe, self.run = setting, setting.recipe, setting.run
        self.out, self.metrics, self.follow, self.progress, self.watch = out, metrics, follow, progress, watch
        self.saved_at = -1  # the step of the newest checkpoint
        dtype = next(iter(setting.run.trainable().values())).dtype
        flops = token_flops(setting.run.model, setting.recipe.data.options.length)
        self.token_share = flops / product_rate(setting.run.device, dtype)  # of a second, were the machine fully used

    @property
    def done(self) -> bool:
        return self.run.step >= self.recipe.settings.steps or bool(self.run.stopped)

    def begin(self, saved: checkpoint.Saved | None) -> None:
        """Continue from a checkpoint, or set up and evaluate the untrained model."""
        run = self.run
        if saved is not None:
            run.stopped = checkpoint.load(saved, run)["stopped"]
            self.saved_at = run.step
        else:
            run.setup()
        self.metrics.truncate(run.step if saved is not None else -1)
        self.show = Progress(self.recipe.settings.steps, self.progress, start=run.step)
        if saved is None:
            self.write({"step": 0} | self.evaluate())

    def step(self) -> None:
        """One step, its record, and a checkpoint when one is due."""
        run, before = self.run, self.run.step
        signals = take_step(run)
        if run.step <= before:  # a part rewound the run: so are its records
            self.metrics.truncate(run.step)
            return
        record: dict[str, Any] = {"step": run.step} | scalars(signals)
        for part in run.parts.values():
            record |= part.metrics() if hasattr(part, "metrics") else {}
        if run.stopped:
            record["stopped"] = run.stopped
        if run.step % self.recipe.eval.every == 0 or self.done:
            record |= self.evaluate()
        spent = self.setting.clock.read()
        busy = sum(seconds for phase, seconds in spent.items() if phase not in ("eval", "save"))
        rate = record["tokens"] / busy if busy else 0.0
        record["time"] = spent | {"tokens_per_second": rate, "mfu": rate * self.token_share}
        record["memory"] = {"peak": peak_memory(run.device)}
        self.write(record)
        every = self.recipe.checkpoint.every
        if every and run.step % every == 0:
            self.save(record.get("val_loss"))

    def end(self) -> None:
        """Save where the run stopped, unless that is saved already."""
        if self.saved_at != self.run.step:
            self.save(self.metrics.read()[-1].get("val_loss"))
        self.show.close()
        self.follow.finish()

    def evaluate(self) -> dict[str, Any]:
        options, setting = self.recipe.eval, self.setting
        return evaluation(self.run, setting.dataset.validation, options.rows, options.measures, setting.others)

    def write(self, record: dict[str, Any]) -> None:
        reason = self.watch(record) if self.watch is not None else ""
        if reason:
            self.run.stop(reason)
            record["stopped"] = reason
        try:
            self.metrics.append(record)
        except StorageError as error:
            raise StorageError(f"{error}; {checkpoint.remaining(self.out)}") from error
        self.follow(record)
        self.show(record)

    def save(self, validation_loss: float | None) -> None:
        with self.run.clock("save"):
            self.metrics.sync()
            checkpoint.save(
                self.out,
                self.run,
                tokenizer=self.setting.dataset.tokenizer,
                export=partial(peft.save, self.run.model, base=base_of(self.recipe)) if self.run.given else None,
                validation_loss=validation_loss,
                keep=self.recipe.checkpoint.keep,
                keep_best=self.recipe.checkpoint.best,
                extra={"stopped": self.run.stopped},
            )
        self.saved_at = self.run.step


def base_of(recipe: Recipe) -> str:
    """What the model that a run begins with can be opened by: its folder or hub id, or its id in the catalogue."""
    return str(getattr(recipe.model.options, "path", recipe.model.id))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's tensors, float32 masters among them, as a checkpoint would hold them."""

    def walk(tree: Any) -> int:
        if isinstance(tree, torch.Tensor):
            return tree.numel() * tree.element_size()
        return sum(walk(v) for v in tree.values()) if isinstance(tree, dict) else 0

    def of(state: dict[str, Any]) -> int:
        return walk(state["state"]) + (of(state["inner"]) if "inner" in state else 0)

    return of(optimizer.state_dict())


def scalars(signals: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The step's single numbers, ready for a record; counts stay whole."""
    return {k: v.item() for k, v in signals.items() if v.dim() == 0}


def sample(setting: Setting, new_tokens: int) -> str:
    """Text that the model writes from the beginning of a document."""
    run, tokenizer = setting.run, setting.dataset.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    with run.optimizer.evaluated():
        ids = generate(
            run.model,
            [start],
            new_tokens,
            generator=rng(run.seed, run.step, "sample", run.device),
            eos=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(ids, skip_special_tokens=True))
