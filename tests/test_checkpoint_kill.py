"""Killed at any moment and resumed, a run ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fallline import checkpoint
from fallline.errors import InputError
from fallline.metrics import read
from killed_run import STEPS, make_run, number, start, train


def trains(folder: Path, die_at: tuple[str, int] | None = None) -> Any:
    """A child process that trains in `folder`."""
    return start(train, folder, die_at, number())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    child = trains(folder)
    child.join()
    assert child.exitcode == 0
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """Every file of the last checkpoint, and the records without what depends on the clock."""
    last = checkpoint.find(folder)[-1]
    found: dict[str, Any] = {str(p.relative_to(last.path)): p.read_bytes() for p in last.path.rglob("*.*")}
    found["metrics"] = [{k: v for k, v in record.items() if k != "time"} for record in read(folder / "metrics.jsonl")]
    return found


def killed(child: Any) -> bool:
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize("point", checkpoint.POINTS)
def test_killed_at_a_write_point_and_resumed_twice(point: str, whole: Path, tmp_path: Path) -> None:
    assert killed(trains(tmp_path, (point, 2)))
    good = checkpoint.latest_good(tmp_path)
    assert good is not None
    assert checkpoint.load(good, run := make_run()) == {"by": "train"}
    assert run.step == good.step
    assert killed(trains(tmp_path, (point, 1)))
    again = checkpoint.latest_good(tmp_path)
    assert again is not None
    assert again.step >= good.step
    assert not killed(trains(tmp_path))
    assert contents(tmp_path) == contents(whole)


def test_killed_while_a_checkpoint_replaces_one_of_the_same_step(whole: Path, tmp_path: Path) -> None:
    assert killed(trains(tmp_path, ("replaced", 1)))
    home = tmp_path / "checkpoints"
    assert not (home / "step-00000008").exists()
    assert contents(tmp_path) == contents(whole), "the old one is found under its hidden name"
    good = checkpoint.latest_good(tmp_path)
    assert good is not None
    checkpoint.load(good, run := make_run())
    checkpoint.save(tmp_path, run, validation_loss=good.validation_loss, keep=1, extra={"by": "train"})
    assert contents(tmp_path) == contents(whole)
    assert not [p for p in home.iterdir() if p.name.startswith(".")]


def test_killed_in_the_first_save_leaves_nothing_to_load(whole: Path, tmp_path: Path) -> None:
    assert killed(trains(tmp_path, ("synced", 1)))
    assert checkpoint.find(tmp_path) == []
    assert checkpoint.latest_good(tmp_path) is None
    assert not killed(trains(tmp_path))
    assert contents(tmp_path) == contents(whole)


def test_killed_at_random_times(whole: Path, tmp_path: Path) -> None:
    """Once anywhere and once a moment after a save was seen, so that most of these are inside it."""
    chance = random.Random(5)
    inside = 0
    for attempt in range(30):
        folder = tmp_path / str(attempt)
        for seen, moment in ((1, 0.1), (2, 0.005)):
            place = number()
            child = start(train, folder, None, place)
            while child.is_alive() and place.value < seen:
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, moment))
            child.kill()
            inside += killed(child) and place.value == 2
        assert not killed(trains(folder))
        assert contents(folder) == contents(whole)
        if inside >= 4:
            break
    assert inside >= 4, f"only {inside} kills landed inside a save"


def test_the_records_of_an_uninterrupted_run(whole: Path) -> None:
    assert [record["step"] for record in read(whole / "metrics.jsonl")] == list(range(1, STEPS + 1))


def hold(folder: Path, place: Any) -> None:
    with checkpoint.lock(folder):
        place.value = 1
        time.sleep(60)


def test_two_processes_cannot_have_one_folder(tmp_path: Path) -> None:
    place = number()
    child = start(hold, tmp_path, place)
    while not place.value:
        time.sleep(0.001)
    with pytest.raises(InputError, match=f"another process is running here .pid {child.pid} on ") as caught:
        checkpoint.lock(tmp_path).__enter__()
    assert "\n" not in str(caught.value)
    child.kill()
    child.join()
    with checkpoint.lock(tmp_path):
        pass
    with checkpoint.lock(tmp_path):
        pass
