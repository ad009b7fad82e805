"""One training step: before, draw, prepare, estimate, update, after.

This file knows the contracts and no method by name. The step itself is the last function. On one rank it waits for the
device once for each evaluation of the loss, to see whether it is finite, and once more where packed or grouped examples
are cut into micro-batches; all else is queued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batches import split
from .contracts import STEP_GIVES, Batch, Change, Draw, Estimator, Objective, Sampler, Schedule, Signals, Source
from .errors import InputError, nearest
from .noise import rng, seed_forward
from .problem import Problem, aux
from .ranks import all_ints, all_rows, all_sum, rank, world
from .trees import copied

if TYPE_CHECKING:
    from .reference import Reference

__all__ = ["Clock", "Problem", "Run", "aux", "take_step"]

Clock = Callable[[str], Any]
"""`with clock("forward"): …` books the time of a phase: data, forward, backward, update."""


@dataclass
class Run:
    """Everything a training run is made of. The words of the step, and the registry of their state.

    Attributes:
        model, objective, source, sampler, estimator, optimizer, schedule: the words of the step.
        micro: rows per forward.
        seed, step: with the state of the words and the marks, all that a step depends on.
        steps: how many there will be, or None: nobody has said.
        parts: adapters, switches, probes, in order.
        clip: largest global gradient norm, or None.
        coefficients: weight of each term that blocks add through `aux`.
        device: where batches go.
        clock: books time, see `Clock`.
        stopped: why the run should end, or empty.
        marks: states to rewind to, by name.
        given: names in the model's state that the recipe gives back and no step changes, such as an adapter's frozen
            base: they are no part of the run's state.
        reference: the model as the run began, for objectives that compare with it; no part of the state either.
    """

    model: nn.Module
    objective: Objective
    source: Source
    sampler: Sampler
    estimator: Estimator
    optimizer: Any
    schedule: Schedule
    micro: int
    seed: int = 0
    step: int = 0
    steps: int | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    clip: float | None = None
    coefficients: dict[str, float] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    clock: Clock = field(default=lambda phase: nullcontext())
    stopped: str = ""
    marks: dict[str, dict[str, Any]] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    reference: Reference | None = None
    _mark: set[str] = field(default_factory=set)
    _rewind: tuple[str, tuple[str, ...]] | None = None

    WORDS = ("model", "objective", "sampler", "estimator", "optimizer", "schedule")
    COUNTS = ("step", "seed", "trainable", "marks")

    def __post_init__(self) -> None:
        """Refuse what the parts' declarations say is impossible.

        Raises:
            InputError: a signal that nobody gives; a closure on an estimator that cannot be asked twice; a part with
                the name of something else in the state; a trained parameter that the optimizer does not hold or that
                model and objective both have; whatever a word's own `check` refuses.
        """
        self.parts = getattr(self.objective, "parts", {}) | self.parts
        for name in self.parts:
            if name in (*self.WORDS, *self.COUNTS):
                raise InputError(f"a part cannot be named {name!r}: the state has that already")
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        params = self.trainable()
        for name, p in params.items():
            if id(p) not in held:
                raise InputError(f"{name!r} requires a gradient, but the optimizer was not given it")
        if len({id(p) for p in params.values()}) < len(params):
            raise InputError("the objective has a parameter of the model's as its own; hold it outside the module tree")
        gives = STEP_GIVES | self.estimator.gives
        for name, word in self.readers().items():
            for signal in sorted(word.reads):
                if signal.split("[")[0] not in gives:
                    raise InputError(
                        f"{name} reads the signal {signal!r}, which nobody gives; {nearest(signal, gives)}"
                    )
        if getattr(self.optimizer, "needs_closure", False) and not self.estimator.repeatable:
            raise InputError("this optimizer evaluates the loss several times a step, which this estimator forbids")
        for word in (self.sampler, self.objective, self.estimator, self.optimizer, self.schedule, *self.parts.values()):
            check: Callable[[Run], None] | None = getattr(word, "check", None)
            if check is not None:
                check(self)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in forward order, the objective's own last."""
        own = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        scored: Any = self.objective
        return own | {f"objective.{n}": p for n, p in scored.named_parameters() if p.requires_grad}

    def readers(self) -> dict[str, Any]:
        """The words and parts that read signals, by name."""
        words = {k: getattr(self, k) for k in ("sampler", "schedule", "objective")} | self.parts
        return {k: v for k, v in words.items() if getattr(v, "reads", ())}

    def stateful(self) -> dict[str, Any]:
        """The registry: every entry has `state_dict` and `load_state_dict`."""
        words = {k: getattr(self, k) for k in self.WORDS}
        return {k: v for k, v in (self.parts | words).items() if hasattr(v, "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on: nested dicts of tensors, numbers and strings."""
        state: dict[str, Any] = {"step": self.step, "seed": self.seed, "trainable": self._shapes()}
        words = {k: v.state_dict() for k, v in self.stateful().items()}
        words["model"] = {k: v for k, v in words["model"].items() if k not in self.given}
        return state | {"marks": self.marks} | words

    def _shapes(self) -> dict[str, list[Any]]:
        return {n: [str(p.dtype).removeprefix("torch."), *p.shape] for n, p in self.trainable().items()}

    def load_state_dict(self, state: Mapping[str, Any], keep: Sequence[str] = ()) -> None:
        """Continue from `state`: shapes first, then values. `keep` names entries that stay as they are.

        Raises:
            InputError: the state is of another set of parts, or of other shapes.
        """
        missing = [k for k in self.stateful() if k not in state]
        if missing:
            raise InputError(f"the saved state has nothing for {', '.join(missing)}: it is of another recipe")
        extra = [k for k in state if k not in (*self.stateful(), *self.COUNTS)]
        if extra:
            raise InputError(f"the saved state has {', '.join(extra)}, this run has not: it is of another recipe")
        for k, part in self.parts.items():  # parts rebuild what they grew or removed
            if hasattr(part, "restructure") and k not in keep:
                self.remap(part.restructure(self, state[k]))
        shapes = self._shapes()
        if "model" not in keep and shapes != state["trainable"]:
            names = sorted(n for n in shapes | state["trainable"] if shapes.get(n) != state["trainable"].get(n))
            n = names[0]
            raise InputError(
                f"the saved state does not fit the model at {n!r}: saved {state['trainable'].get(n)}, "
                f"here {shapes.get(n)} ({len(names)} parameters differ)"
            )
        self.step, self.seed = state["step"], state["seed"]
        self.marks = dict(state["marks"])
        rates = [torch.as_tensor(group["lr"], dtype=torch.float64).clone() for group in self.optimizer.param_groups]
        for k, v in self.stateful().items():
            if k == "model" and k not in keep:
                self._load_model(state[k])
            elif k not in keep:
                v.load_state_dict(state[k])
        if "schedule" in keep:  # the rates are its doing: they stay with it
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].copy_(rate)  # it may be held elsewhere too
                else:
                    group["lr"] = rate.item()

    def _load_model(self, state: Mapping[str, Tensor]) -> None:
        """The model's state, all but what is `given`."""
        found = self.model.load_state_dict(state, strict=not self.given)
        wrong = [*found.unexpected_keys, *(set(found.missing_keys) - self.given)]
        if wrong:
            raise InputError(f"the saved state does not fit the model at {min(wrong)!r}")

    def remap(self, changes: Sequence[Change] | None) -> None:
        """The one door through which parameters come, go or change shape.

        Raises:
            InputError: the optimizer cannot follow.
        """
        if not changes:
            return
        if not hasattr(self.optimizer, "remap"):
            kind = type(self.optimizer).__name__
            raise InputError(f"{changes[0].name!r} changes during the run, which the optimizer {kind} cannot follow")
        for change in changes:
            for p in (change.old, change.new):
                if p is not None:
                    p.grad = None
        self.optimizer.remap(changes)
        self.given -= {change.name for change in changes if change.new is not None}  # from now on they are trained

    def mark(self, name: str) -> None:
        """Ask to keep the state at the end of this step under `name`, to `rewind` to; it is part of the run's state."""
        self._mark.add(name)

    def rewind(self, name: str, keep: Sequence[str] = ()) -> None:
        """Ask to go back to a mark once this step is through, without the entries of `keep`.

        With `keep = ("schedule",)` the learning rates stay too.
        """
        if self._rewind is not None:
            raise InputError("two parts asked to rewind the run in one step; only one may")
        if name not in self.marks:
            raise InputError(f"no mark {name!r} to rewind to; {nearest(name, self.marks)}")
        for k in keep:
            if k not in self.stateful():
                raise InputError(f"cannot keep {k!r}, the state has no such entry; {nearest(k, self.stateful())}")
        self._rewind = (name, tuple(keep))

    def stop(self, reason: str) -> None:
        """Ask the loop to end after this step."""
        self.stopped = reason

    def setup(self) -> None:
        """Once before step 0: parts calibrate and initialise, and may change what is trained."""
        for name, part in self.parts.items():
            if hasattr(part, "setup"):
                seed_forward(self.seed, self.step, f"setup/{name}", self.device)
                self.remap(part.setup(self))

    def _between(self) -> None:
        """The end of a step: mark, then rewind, if that was asked for."""
        for name in sorted(self._mark):
            self.marks[name] = copied({k: v for k, v in self.state_dict().items() if k != "marks"})
        self._mark.clear()
        if self._rewind is not None:
            (name, keep), self._rewind = self._rewind, None
            self.load_state_dict(copied(self.marks[name]) | {"marks": self.marks}, keep)


def denominators(run: Run, batch: Batch, draw: Draw, dtype: torch.dtype, examples: int) -> dict[str, Tensor]:
    """term → []: what each term is divided by; under the empty name the number of examples, for `aux` terms."""
    counts = run.objective.count(batch)
    whole = torch.full((), max(1, examples) if draw.size is None else draw.size, dtype=dtype, device=run.device)
    if draw.size is not None:
        return dict.fromkeys([*counts, ""], whole)
    total = all_sum(torch.stack([count.sum().to(dtype) for count in counts.values()]))
    return dict(zip(counts, torch.where(total == 0, 1, total).unbind(), strict=True)) | {"": whole}


def ask(run: Run) -> tuple[Batch, Problem, int]:
    """Draw and prepare: this step's batch, its problem, and the number of positions in it on all ranks.

    It follows from seed, step and state, so that a part may ask too.
    """
    params = run.trainable()
    if not params:
        raise InputError("there is nothing to train: no parameter requires a gradient")
    dtype = torch.promote_types(next(iter(params.values())).dtype, torch.float32)  # of weights, sums and the loss

    with run.clock("data"):
        whole = run.sampler.draw(run.step, rng(run.seed, run.step, "draw"))
        draw = whole.part(rank(), world())
        batch = run.source(draw, rng(run.seed, run.step, "noise"))
        batch = batch | {"example_id": draw.ids, "weight": draw.weight.to(dtype)}
        batch = batch | ({} if draw.group is None else {"group_id": draw.group})
        batch = {k: v.to(run.device, non_blocking=True) for k, v in batch.items()}

    for word in (run.sampler, run.objective):  # select, generate, attack, look up references
        if hasattr(word, "prepare"):
            seed_forward(run.seed, run.step, f"prepare/{rank()}", run.device)
            batch = word.prepare(run, batch)
    if run.objective.couples == "group" and "group_id" not in batch:
        raise InputError("this objective couples the examples of a group, but the batch has no group_id")
    micro = split(batch, run.micro)
    if run.objective.couples == "batch" and (len(micro) > 1 or world() > 1):
        raise InputError("this objective couples all examples of a batch: run it on one rank with micro equal to batch")

    want = frozenset().union(*(reader.reads for reader in run.readers().values()))
    positions = sum(b["input_ids"].numel() for b in micro if "input_ids" in b)
    sizes, tokens = zip(*all_ints(len(batch["example_id"]), positions, device=run.device), strict=True)
    problem = Problem(run, micro, denominators(run, batch, draw, dtype, sum(sizes)), params, sizes, want)
    return batch, problem, sum(tokens)


def take_step(run: Run) -> Signals:
    """One step of training. Returns what it learned."""
    for part in run.parts.values():
        run.remap(part.before_step(run) if hasattr(part, "before_step") else ())
    batch, problem, tokens = ask(run)
    if getattr(run.optimizer, "needs_closure", False):
        run.optimizer.step(problem)
    else:
        problem()
        with run.clock("update"):
            run.optimizer.step()

    signals = problem.signals
    rate = run.optimizer.param_groups[0]["lr"]
    signals["lr"] = rate.clone() if isinstance(rate, Tensor) else torch.tensor(rate)
    signals["tokens"] = torch.tensor(tokens)
    signals["example_id"] = all_rows(batch["example_id"], problem.sizes)
    readers = run.readers()
    run.schedule.step(*([signals] if "schedule" in readers else []))
    for name in ("sampler", "objective"):
        if name in readers:
            readers[name].observe(run, signals)
    for part in run.parts.values():
        run.remap(part.after_step(run, signals) if hasattr(part, "after_step") else ())
    run.step += 1
    run._between()
    return signals
