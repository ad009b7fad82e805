"""Reports of runs made one by one, and of several comparisons: what is known to be of the same data is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fallline.drivers.compare.merge import joined, of_runs
from fallline.drivers.compare.record import set_times
from fallline.recipe import Recipe
from fallline.report import analyse

RECIPE = """
model: {name: llama, preset: tiny}
data: {name: python-docs, length: 64}
steps: 3
eval: {measures: [nll]}
"""


def made(folder: Path, optimizer: str, seed: int, data: str = "old", **more: Any) -> Path:
    """A finished run's folder, as far as a report reads it."""
    folder.mkdir()
    recipe = Recipe.parse(RECIPE, f"optimizer={optimizer}", f"seed={seed}")
    record = {
        "recipe": recipe.to_mapping(),
        "fallline": "1",
        "threads": 1,
        "device": "cpu",
        "data": {"sha256": data},
        "tokenizer": {"sha256": "t"},
        "model": {"sha256": "m", "parameters": 1},
    }
    (folder / "run.json").write_text(json.dumps(record | more))
    loss = 3 + 0.1 * seed - (1 + 0.01 * seed) * (optimizer == "sgd")
    lines = [{"step": s, "val_loss": loss, "measures": {"nll": loss + 0.01 * seed}} for s in (0, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("change", "loss", "measure"),
    [
        ({}, "lower", True),
        ({"data": "new"}, "not comparable", False),
        ({"tokenizer": {"sha256": "u"}}, "not comparable", False),
        ({"also": {"docs": {"sha256": "new"}}}, "lower", False),
    ],
)
def test_runs_of_a_choice_are_of_one_data(change: dict[str, Any], loss: str, measure: bool, tmp_path: Path):
    runs = [made(tmp_path / f"{o}-{s}", o, s) for o in ("adamw", "sgd") for s in (0, 1)]
    runs.append(made(tmp_path / "adamw-2", "adamw", 2))
    runs.append(made(tmp_path / "sgd-2", "sgd", 2, **change))
    found = analyse(of_runs(runs))["analysis"]["choices"][1]
    assert found["verdict"] == loss
    assert (found["measures"]["nll"]["difference"] is not None) is measure


def test_runs_made_on_other_machines_are_told(tmp_path: Path):
    runs = [made(tmp_path / "a", "adamw", 0), made(tmp_path / "b", "sgd", 0, device="NVIDIA H200", threads=8)]
    notes = " ".join(of_runs(runs)["notes"])
    assert "more than one set of device" in notes
    assert "more than one set of threads" in notes
    assert "set of versions" not in notes


def test_a_choice_joined_from_two_data_has_none_in_common(tmp_path: Path):
    old, new = (of_runs([made(tmp_path / data, "adamw", s, data)])["choices"][0] for s, data in enumerate(("a", "b")))
    assert joined(old, old)["measured_on"] == old["measured_on"] != ""
    both = joined(old, new)
    assert (both["comparable"], both["measured_on"]) == ("", "")


@pytest.mark.parametrize(("void", "step"), [(False, 1.0), (True, 0.2)])
def test_seconds_are_not_made_of_a_void_time(void: bool, step: float):
    phases = {"update": 0.1}
    first = {"step": 0.5, "ratio": 1.0, "to": "a", "void": void, "interleaved": True, "phases": phases}
    other = {"step": 0.2, "ratio": 2.0, "to": "a", "void": False, "interleaved": True, "phases": phases}
    choices: list[dict[str, Any]] = [{"label": label, "time": None} for label in ("a", "b")]
    set_times(choices, {"a": {"time": first, "tokens": 1}, "b": {"time": other, "tokens": 1}}, "a")
    assert choices[1]["time"]["step"] == step
    assert choices[1]["time"]["ratio"] == 2
