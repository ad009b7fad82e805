"""State: stopping and resuming, marks and rewinding, probes, and what must be left as it was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fallline.contracts import Batch, Change, Signals
from fallline.errors import InputError
from fallline.gradients.backprop import Backprop as RealBackprop
from fallline.optim import adamw as real_adamw
from fallline.optim import scale as real_scale
from fallline.schedules import cosine as real_cosine
from fallline.step import Run, take_step

from .helpers import assert_left_as_found, equal, make, saved
from .toy_methods import Backprop, Grow, LineSearch, Momentum, Perturbed, Probe, SpikeRollback, ZerothOrder
from .toys import Adaptive, Net, Packed, Texts, Uniform


def disturb(n: int) -> None:
    """What another library might do to the global generator between steps."""
    torch.manual_seed(n)
    torch.rand(n)


def straight(build: Callable[[], Run], steps: int) -> tuple[dict[str, Any], list[Signals]]:
    run = build()
    signals = [take_step(run) for _ in range(steps)]
    return saved(run), signals


def in_pieces(build: Callable[[], Run], pieces: list[int]) -> tuple[dict[str, Any], list[Signals]]:
    """The same steps with a stop after each piece: all that survives a stop is what went through the file."""
    state, signals = None, []
    for n in pieces:
        run = build()
        if state is not None:
            run.load_state_dict(state)
        for _ in range(n):
            disturb(len(signals) + 3)
            signals.append(take_step(run))
        disturb(n)
        state = saved(run)
    assert state is not None
    return state, signals


class Rises:
    """A closed-loop schedule: the rate falls when the loss rises."""

    reads = frozenset({"loss"})

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.last = optimizer, torch.tensor(torch.inf)

    def step(self, signals: Signals) -> None:
        group = self.optimizer.param_groups[0]
        group["lr"] *= 0.7 if bool(signals["loss"] > self.last) else 1.02
        self.last = signals["loss"].clone()

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = state["last"].clone()


def adamw(named: dict[str, Any]) -> Any:
    return real_adamw.build(real_adamw.Config(lr=0.02), named.items())


def scale(named: dict[str, Any]) -> Any:
    return real_scale.build(real_scale.Config(lr=0.02), named.items())


def cosine(optimizer: Any) -> Any:
    return real_cosine.build(real_cosine.Config(), optimizer, 12)


COMBINATIONS: dict[str, dict[str, Any]] = {
    "backprop": {},
    "adaptive sampler": {"sampler": Adaptive},
    "perturbed": {"estimator": Perturbed, "sampler": Adaptive},
    "zeroth order": {"estimator": ZerothOrder, "optimizer": lambda named: Momentum(named, 0.004)},
    "line search": {"optimizer": LineSearch, "sampler": Adaptive},
    "perturbed line search": {"estimator": Perturbed, "optimizer": LineSearch},
    "closed-loop schedule": {"schedule": Rises, "clip": 0.5},
    "adamw": {"optimizer": adamw, "schedule": cosine, "estimator": RealBackprop, "sampler": Adaptive},
    "scale": {"optimizer": scale, "schedule": cosine, "estimator": RealBackprop},
    "packed": {"source": lambda: Texts(per_row=3), "sampler": lambda: Packed(5), "micro": 2},
}


def builder(words: dict[str, Any], **parts: Callable[[], Any]) -> Callable[[], Run]:
    """A function that makes the run anew, from nothing but its recipe."""

    def build() -> Run:
        made = {k: v() if k in ("sampler", "estimator", "source") else v for k, v in words.items()}
        made.setdefault("micro", 5)
        return make(net=Net(dropout=0.2), parts={k: part() for k, part in parts.items()}, **made)

    return build


@pytest.mark.parametrize("words", COMBINATIONS.values(), ids=list(COMBINATIONS))
@pytest.mark.parametrize("grow", [False, True], ids=["", "growing"])
def test_resuming_twice_is_bit_identical(words: dict[str, Any], grow: bool) -> None:
    build = builder(words, probe=Probe, **({"grow": lambda: Grow(5)} if grow else {}))
    state, signals = straight(build, 12)
    for pieces in ([3, 4, 5], [5, 1, 6]) if grow else ([3, 4, 5],):  # right before the growth, and right after it
        again, others = in_pieces(build, pieces)
        assert equal(again, state)
        assert equal(others, signals)
    if grow:
        assert state["grow"] == {"rank": 2}
        assert state["trainable"]["A"] == ["float64", 2, 5]


def test_a_roll_back_survives_a_stop() -> None:
    """Marks are part of the state: here the run is stopped between the mark and the way back to it."""
    build = builder({"sampler": Adaptive}, grow=lambda: Grow(5), rollback=lambda: SpikeRollback([5, 8]))
    state, signals = straight(build, 12)
    for pieces in ([3, 4, 5], [5, 1, 6], [1] * 12):
        again, others = in_pieces(build, pieces)
        assert equal(again, state)
        assert equal(others, signals)
    assert state["step"] == 12 - 2 - 2
    assert state["rollback"] == {"done": 2}


def test_rewinding_is_exact() -> None:
    """Also back over a growth: the parameters have their old shapes again."""

    class Back(Probe):
        def after_step(self, run: Run, signals: Signals) -> None:
            if run.step == 2:
                run.mark("here")
            if run.step == 7 and not self.seen:
                self.seen.append(signals["loss"])
                run.rewind("here")

    run = make(net=Net(dropout=0.2), sampler=Adaptive(), parts={"grow": Grow(5), "back": Back()})
    first = [take_step(run) for _ in range(3)]
    state = saved(run)
    mark = state["marks"]["here"]
    assert equal({k: v for k, v in state.items() if k != "marks"}, mark)
    first += [take_step(run) for _ in range(5)]
    assert run.step == 3
    assert run.model.A.shape[0] == 1
    assert equal(saved(run), state)
    second = [take_step(run) for _ in range(5)]
    assert equal(second, first[3:])
    assert equal(run.marks["here"], mark)  # training on has not touched it


def test_rewinding_with_the_schedule_kept() -> None:
    """Weights, momentum and step go back; the schedule's count and the learning rate do not."""

    class Back(Probe):
        reads = frozenset[str]()

        def after_step(self, run: Run, signals: Signals) -> None:
            if run.step == 1:
                run.mark("here")
            if len(self.seen) == 4:
                run.rewind("here", keep=("schedule",))
            self.seen.append(signals["lr"])

    run = make(parts={"back": Back()})
    take_step(run), take_step(run)
    state = saved(run)
    for _ in range(3):
        take_step(run)
    rewound = saved(run)
    assert run.step == 2
    assert run.schedule.last_epoch == 5
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 1.25)
    assert all(equal(rewound[k], state[k]) for k in ("model", "objective", "step"))
    assert equal(rewound["optimizer"]["state"], state["optimizer"]["state"])
    assert take_step(run)["lr"] == pytest.approx(0.1 / 1.25)


def test_only_one_part_may_rewind() -> None:
    class Back:
        def after_step(self, run: Run, signals: Signals) -> None:
            if run.step == 0:
                run.mark("here")
            else:
                run.rewind("here")

    run = make(parts={"a": Back(), "b": Back()})
    take_step(run)
    with pytest.raises(InputError, match="two parts asked to rewind"):
        take_step(run)


def test_rewinding_to_an_unknown_mark_is_refused() -> None:
    run = make()
    run.mark("good")
    take_step(run)
    with pytest.raises(InputError, match="no mark 'goood' to rewind to; did you mean 'good'"):
        run.rewind("goood")
    with pytest.raises(InputError, match=r"cannot keep 'shedule'.*did you mean 'schedule'"):
        run.rewind("good", keep=("shedule",))


def test_stop_is_a_request() -> None:
    class Enough:
        def after_step(self, run: Run, signals: Signals) -> None:
            if run.step == 1:
                run.stop("enough")

    run = make(parts={"enough": Enough()})
    take_step(run)
    assert run.stopped == ""
    take_step(run)
    assert run.stopped == "enough"
    assert run.step == 2


def test_a_probe_leaves_the_run_bit_identical() -> None:
    words = {"sampler": Adaptive}
    (state, signals), (others, watched) = (straight(builder(words, **p), 6) for p in ({}, {"probe": Probe}))
    assert equal(state, others)
    for a, b in zip(signals, watched, strict=True):
        assert equal(a, {k: b[k] for k in a})


@pytest.mark.parametrize("change", ["another", "fewer"])
def test_a_state_of_another_set_of_parts_is_refused(change: str) -> None:
    grown, plain = make(parts={"grow": Grow(0)}), make()
    a, b = (plain, grown) if change == "another" else (grown, plain)
    with pytest.raises(InputError, match=r"grow.*of another recipe"):
        a.load_state_dict(saved(b))


def test_a_state_of_other_shapes_is_refused() -> None:
    run = make()
    state = saved(run)
    state["trainable"]["head.bias"] = ["float32", 7]
    before = saved(run)
    with pytest.raises(InputError, match=r"'head.bias': saved \['float32', 7\], here \['float64', 7\] \(1 parameters"):
        run.load_state_dict(state)
    assert equal(saved(run), before)


def test_setup_runs_once_and_is_seeded() -> None:
    class Calibrates:
        def setup(self, run: Run) -> None:
            self.drawn = torch.rand(3)

    parts = []
    for n in (1, 2):
        disturb(n)
        parts.append({"a": Calibrates(), "b": Calibrates()})
        make(parts=parts[-1]).setup()
    assert torch.equal(parts[0]["a"].drawn, parts[1]["a"].drawn)
    assert not torch.equal(parts[0]["a"].drawn, parts[0]["b"].drawn)


def test_what_setup_changes_the_optimizer_follows() -> None:
    class Begins(Grow):
        def setup(self, run: Run) -> list[Change]:
            return self.resize(run.model, 2)

    run = make(parts={"grow": Begins(99)})
    run.setup()
    take_step(run)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.trainable().values()}
    again = make(parts={"grow": Begins(99)})
    again.load_state_dict(saved(run))
    take_step(run), take_step(again)
    assert equal(saved(run), saved(again))


def test_the_checker_of_prepare_sees_what_a_prepare_may_not_do() -> None:
    class Honest(Uniform):
        def prepare(self, run: Run, batch: Batch) -> Batch:
            with torch.no_grad():
                run.model.hidden(batch["input_ids"])
            return {k: v[:3] for k, v in batch.items()}

    class Trains(Uniform):
        def prepare(self, run: Run, batch: Batch) -> Batch:
            run.model.hidden(batch["input_ids"]).sum().backward()
            return batch

    class Moves(Uniform):
        def prepare(self, run: Run, batch: Batch) -> Batch:
            with torch.no_grad():
                run.model.A.add_(1)
            return batch

    class Frees(Uniform):
        def prepare(self, run: Run, batch: Batch) -> Batch:
            run.model.A.requires_grad_(False)
            return batch

    class Evaluates(Uniform):
        def prepare(self, run: Run, batch: Batch) -> Batch:
            run.model.eval()
            return batch

    assert_left_as_found(make(sampler=Honest()), "sampler")
    for bad in (Trains, Moves, Frees, Evaluates):
        with pytest.raises(AssertionError):
            assert_left_as_found(make(sampler=bad()), "sampler")


def test_an_estimator_leaves_weights_as_found() -> None:
    for estimator in (Backprop, Perturbed, ZerothOrder):
        run = make(estimator=estimator(), optimizer=lambda named: Momentum(named, 0.0))
        before = saved(run)["model"]
        take_step(run)
        assert equal(saved(run)["model"], before)
