"""Measuring in turns when processes do not fit or fail: the one thing here that is faked is the process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from fallline.drivers.compare import measuring
from fallline.drivers.compare.measuring import MeterError, measure
from fallline.recipe import Recipe

LABELS = ("a", "b", "c")


class World:
    """Meters that take so many seconds a step, can die after so many turns, and may not fit beside each other."""

    def __init__(self, seconds: dict[str, float], turns: dict[str, int] | None = None, room: int = 2) -> None:
        self.seconds, self.turns, self.room = seconds, turns or {}, room
        self.open: list[str] = []

    def meter(self, label: str) -> Any:
        world = self
        if len(self.open) >= self.room or label not in self.seconds:
            raise MeterError("no room")
        self.open.append(label)

        class Fake:
            found = {"memory": {"peak": 1}, "tokens": 8}  # noqa: RUF012
            left = world.turns.get(label, 10**9)

            def steps(self, number: int) -> tuple[float, dict[str, float]]:
                self.left -= 1
                if self.left < 0:
                    self.close()
                    raise MeterError("it died")
                return number * world.seconds[label], {"update": 0.1}

            def ended(self) -> bool:
                return label not in world.open

            def close(self) -> None:
                if label in world.open:
                    world.open.remove(label)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                self.close()

        return Fake()


def found(world: World, monkeypatch: pytest.MonkeyPatch, known: dict[str, Any] | None = None) -> dict[str, Any]:
    recipes = {label: Recipe.load("recipes/tiny.yaml") for label in LABELS}
    labels = {id(recipe): label for label, recipe in recipes.items()}
    monkeypatch.setattr(measuring, "Meter", lambda recipe, force: world.meter(labels[id(recipe)]))
    kept: dict[str, Any] = {}
    measure(recipes, known or {}, kept.__setitem__, lambda: False)
    assert world.open == [], "every process was ended"
    return kept


def test_times_are_multiples_of_the_first(monkeypatch: pytest.MonkeyPatch):
    kept = found(World({"a": 0.1, "b": 0.2, "c": 0.05}), monkeypatch)
    assert {label: round(k["time"]["ratio"], 9) for label, k in kept.items()} == {"a": 1, "b": 2, "c": 0.5}
    assert {k["time"]["to"] for k in kept.values()} == {"a"}
    assert all(k["time"]["rounds"] >= 7 and not k["time"]["void"] for k in kept.values())


def test_what_does_not_fit_beside_the_first_is_timed_alone(monkeypatch: pytest.MonkeyPatch):
    kept = found(World({"a": 0.1, "b": 0.2, "c": 0.05}, room=1), monkeypatch)
    assert kept["a"]["time"]["to"] == "a"
    for label in ("b", "c"):
        assert kept[label]["time"]["to"] is None
        assert kept[label]["time"]["interleaved"] is False
        assert kept[label]["time"]["step"] == pytest.approx({"b": 0.2, "c": 0.05}[label])


def test_a_first_that_cannot_be_built_leaves_the_others(monkeypatch: pytest.MonkeyPatch):
    kept = found(World({"b": 0.2, "c": 0.4}), monkeypatch)
    assert kept["a"] == {"error": "no room"}
    assert kept["c"]["time"]["to"] == "b"
    assert kept["c"]["time"]["ratio"] == pytest.approx(2)


@pytest.mark.parametrize("turns", [3, 15])
def test_a_first_that_dies_while_it_is_timed_costs_no_choice_its_runs(turns: int, monkeypatch: pytest.MonkeyPatch):
    kept = found(World({"a": 0.1, "b": 0.2, "c": 0.3}, {"a": turns}), monkeypatch)
    assert set(kept) == {"a", "b", "c"}
    assert all("error" not in k and k["memory"] for k in kept.values())
    assert ("time" in kept["a"]) is (turns > 11)


def test_one_that_dies_while_it_is_timed_has_no_time_and_the_next_has(monkeypatch: pytest.MonkeyPatch):
    kept = found(World({"a": 0.1, "b": 0.2, "c": 0.3}, {"b": 5}), monkeypatch)
    assert "time" not in kept["b"]
    assert "error" not in kept["b"]
    assert kept["c"]["time"]["ratio"] == pytest.approx(3)


def test_what_is_known_is_only_taken_turns_with(monkeypatch: pytest.MonkeyPatch):
    known = {"a": {"time": {}}, "b": {"time": {}}}
    kept = found(World({"a": 0.1, "b": 0.2, "c": 0.3}), monkeypatch, known)
    assert set(kept) == {"c"}
    assert kept["c"]["time"]["to"] == "a"
    assert found(World({}), monkeypatch, {label: {"time": {}} for label in LABELS}) == {}


def test_a_meter_ends_in_the_middle_of_a_step_when_nobody_listens_any_more():
    code = "import time\nfrom fallline.drivers.compare.meter import end_with\nend_with(0)\nprint('ready', flush=True)\n"
    asked = [sys.executable, "-c", f"{code}time.sleep(600)"]
    with subprocess.Popen(asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            assert process.poll() is None
            process.stdin.close()  # as the end of the process that holds it does
            assert process.wait(timeout=60) == 1
        finally:
            process.kill()
