"""Whole comparisons, with real processes: what is run, what is not run twice, what is left when something fails."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from fallline.catalog import find
from fallline.drivers.compare import Comparison, compare, measuring, rebuild, work
from fallline.drivers.compare.run import ask
from fallline.drivers.compare.server import Server
from fallline.drivers.compare.study import finals_of, read_study
from fallline.drivers.train import train
from fallline.errors import InputError
from fallline.metrics import read
from fallline.recipe import Recipe
from launcher import Launcher

OVER = ("optimizer=adamw,sgd",)
TUNE = "optimizer.lr=1e-2:1e-1"


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Short turns, whose times nobody looks at; servers, which remember nothing, for one comparison after another."""
    free: list[Server] = []

    class Kept(Server):
        def close(self) -> None:
            free.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "SECONDS", 0.01)
        patch.setattr(work, "Server", lambda: free.pop() if free else Kept())
        yield
    for server in free:
        Server.close(server)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(
        f"""
model: {{name: llama, preset: tiny}}
data: {{name: text, path: {json.dumps(str(corpus))}, length: 32, vocab: 300}}
optimizer: {{name: adamw, lr: 3e-3}}
steps: 9
batch: 2
threads: 1
eval: {{every: 3, rows: 4}}
checkpoint: {{every: 4}}
"""
    )
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[Path, dict[str, Any]]:
    """A tuned comparison of two optimizers on two seeds, which nobody disturbed."""
    out = tmp_path_factory.mktemp("study") / "whole"
    found = compare(recipe, over=OVER, seeds=2, tune=TUNE, out=out, progress=None)
    assert found.signal is None
    shutil.copytree(out, out.with_name("measured"), ignore=shutil.ignore_patterns("runs"))
    return out, found.report


@pytest.fixture(scope="module")
def untuned(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Comparison:
    """A comparison whose first choice diverges."""
    over = ("optimizer={name: sgd, lr: 1e30},adamw",)
    return compare(recipe, over=over, seeds=2, out=tmp_path_factory.mktemp("untuned"), progress=None)


def measured(study: tuple[Path, dict[str, Any]], folder: Path) -> Path:
    """The same comparison as it was after measuring, in `folder`."""
    shutil.copytree(study[0].with_name("measured"), folder)
    for path in (folder / "measured").glob("*.json"):  # a time that was void would be taken again, and may
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"time": found["time"] | {"void": False}}))
    return folder


def choices(report: dict[str, Any]) -> dict[str, Any]:
    return {c["label"]: c for c in report["choices"]}


def finals(report: dict[str, Any]) -> dict[str, dict[int, float]]:
    return {c["label"]: {r["seed"]: r["loss"] for r in c["runs"] if r["kind"] == "final"} for c in report["choices"]}


def kept(folder: Path) -> dict[str, int]:
    """When each file of a run was written."""
    return {str(p): p.stat().st_mtime_ns for p in (folder / "runs").rglob("*") if p.is_file() and p.name != ".lock"}


def test_every_choice_is_tuned_alike_and_judged_on_other_seeds(study: tuple[Path, dict[str, Any]]):
    _, report = study
    for choice in report["choices"]:
        trials = [r for r in choice["runs"] if r["kind"] == "trial"]
        assert choice["status"] == "done"
        assert {r["seed"] for r in trials} == {0}
        assert {1e-2, 3.16e-2, 1e-1} <= {r["value"] for r in trials}
        assert choice["tuned"]["value"] == min((r["loss"], r["value"]) for r in trials if r["status"] == "done")[1]
    assert {*finals(report)["adamw"]} == {*finals(report)["sgd"]} == {1, 2}
    assert report["tune"]["rule"]
    for path, code in find("optimizer", "sgd").sources().items():
        assert report["sources"][path] == code


def test_every_run_has_a_process_of_its_own(study: tuple[Path, dict[str, Any]]):
    folder, report = study
    holders = [path.read_text() for path in (folder / "runs").glob("*/*/.lock")]
    assert len(holders) == sum(len(c["runs"]) for c in report["choices"])
    assert len({*holders}) == len(holders)
    assert f"pid {os.getpid()} " not in " ".join(holders)


def test_a_run_is_the_one_that_train_makes(study: tuple[Path, dict[str, Any]], tmp_path: Path):
    folder, report = study
    tuned = choices(report)["sgd"]["tuned"]["value"]
    stored = Recipe.load(folder / "runs" / "sgd" / "seed-2", f"out={json.dumps(str(tmp_path / 'run'))}")
    assert stored.optimizer.options.lr == tuned
    result = train(stored, progress=None)

    def plain(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k not in ("time", "memory")} for r in records]

    assert plain(result.metrics) == plain(read(folder / "runs" / "sgd" / "seed-2" / "metrics.jsonl"))
    assert result.validation_loss == finals(report)["sgd"][2]


def test_memory_and_time_are_measured(study: tuple[Path, dict[str, Any]]):
    _, report = study
    adamw, sgd = (choices(report)[name] for name in ("adamw", "sgd"))
    for choice in (adamw, sgd):
        memory, time = choice["memory"], choice["time"]
        assert memory["weights"] >= 4 * choice["parameters"]
        assert memory["peak"] == sum(memory[part] for part in ("weights", "gradients", "optimizer", "rest"))
        assert {"forward", "backward", "update"} <= set(time["phases"])
        assert time["rounds"] >= 7
        assert time["step"] > 0
        assert time["tokens"] == 64
    assert adamw["time"]["ratio"] == 1
    assert adamw["memory"]["optimizer"] >= 8 * adamw["parameters"]
    assert sgd["memory"]["optimizer"] == 0


def test_only_the_runs_that_count_keep_their_weights(study: tuple[Path, dict[str, Any]]):
    folder, _ = study
    assert (folder / "runs" / "adamw" / "seed-1" / "model" / "config.json").is_file()
    assert not list((folder / "runs").glob("*/trial-*/checkpoints"))
    assert not list((folder / "runs").glob("*/trial-*/model"))


def test_nothing_is_run_twice_and_choices_and_seeds_can_be_added(
    study: tuple[Path, dict[str, Any]], recipe: Path, tmp_path: Path
):
    folder, report = study
    for path in (folder / "measured").glob("*.json"):  # a time that was void would be taken again, and may
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"time": found["time"] | {"void": False}}))
    before = kept(folder)
    again = compare(folder, resume=True, progress=None)
    assert kept(folder) == before
    assert finals(again.report) == finals(report)
    more = compare(
        recipe,
        over=("optimizer=adamw,sgd,scale",),
        seeds=3,
        tune=TUNE,
        out=folder,
        resume=True,
        progress=None,
    )
    after = kept(folder)
    assert {path: after[path] for path in before} == before
    new = {Path(path).relative_to(folder / "runs").parts[:2] for path in after if path not in before}
    assert {name for label, name in new if label != "scale"} == {"seed-3", "seed-3.json", "seed-3.log"}
    assert choices(more.report)["scale"]["status"] == "done"
    assert {*finals(more.report)["adamw"]} == {1, 2, 3}
    for change, message in (
        ({"tune": "optimizer.lr=1e-3:1e-2"}, "tune"),
        ({"seeds": 1}, "seeds"),
        ({"over": ("optimizer=adamw,scale",)}, "'sgd'"),
        ({"equal": "time"}, "equal"),
    ):
        asked: dict[str, Any] = {"over": ("optimizer=adamw,sgd,scale",), "seeds": 3, "tune": TUNE}
        with pytest.raises(InputError, match=message):
            compare(recipe, **(asked | change), out=folder, resume=True, progress=None)
    with pytest.raises(InputError, match="steps was 9, is 10"):
        compare(recipe, "steps=10", **asked, out=folder, resume=True, progress=None)
    with pytest.raises(InputError, match="--resume"):
        compare(recipe, **asked, out=folder, progress=None)
    with pytest.raises(InputError, match="holds the question already"):
        compare(folder, seeds=5, resume=True, progress=None)
    assert kept(folder) == after


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGTERM, id="asked to stop", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_comparison_resumes_to_the_same_end(
    number: signal.Signals, study: tuple[Path, dict[str, Any]], tmp_path: Path, fallline: Launcher
):
    _, report = study
    out = measured(study, tmp_path / "cut")
    command = ("compare", str(out), "--resume")
    ended = fallline(*command, signal_when=(number, out / "runs" / "sgd" / "seed-1" / "run.json"))
    if number == signal.SIGTERM:
        assert "did not finish." in ended.output  # sgd, or one of its seeds: the first may just have got through
        assert "failed" not in ended.output
        assert f"continue with: fallline compare {out} --resume" in ended.output
    assert ended.code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number), ended.output
    assert not (out / "runs" / "sgd" / "seed-2.json").exists()
    before = kept(out)
    done = {path for path in before if Path(path).parent.parent == out / "runs"}
    again = compare(out, resume=True, progress=None)
    assert again.signal is None
    assert {path: time for path, time in kept(out).items() if path in done} == {p: before[p] for p in done}
    expected = finals(report)
    assert finals(again.report) == {name: expected[name] for name in ("adamw", "sgd")}


def test_a_choice_that_fails_is_told_and_the_rest_kept(untuned: Comparison):
    by = choices(untuned.report)
    failed = by["sgd lr=1e30"]
    assert failed["status"] == "failed"
    assert "loss is nan" in failed["error"]
    assert by["adamw"]["status"] == "done"
    assert untuned.report["baseline"] == "adamw"
    assert "sgd lr=1e30 failed" in " ".join(untuned.report["analysis"]["summary"]["answer"])


@pytest.mark.slow
def test_a_full_disk_loses_nothing(recipe: Path, study: tuple[Path, dict[str, Any]], tmp_path: Path):
    out = tmp_path / "full"
    command = [sys.executable, "-m", "fallline.cli.main", "compare", str(recipe), "--over", *OVER, "--out", str(out)]

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_large_files)
    assert ended.returncode == 4, ended.stderr
    error = ended.stderr.strip().splitlines()[-1]
    assert error.startswith("fallline: error: ")
    assert f"continue with: fallline compare {out} --resume" in error
    again = compare(out, resume=True, progress=None)
    assert {c["status"] for c in again.report["choices"]} == {"done"}


def test_room_is_looked_for_before_the_first_step(
    study: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    out = measured(study, tmp_path / "out")
    with pytest.raises(InputError, match="1 MiB are free"):
        compare(out, resume=True, progress=None)
    assert not (out / "runs").exists()


def test_runs_at_a_time_must_fit_together(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    question = ask(recipe, (), ("optimizer=adamw,sgd,lion",), 2, None, "tokens", 3, "")
    monkeypatch.setattr(work, "at_hand", lambda device: 100e6)

    def check(parallel: int, force: bool = False) -> None:
        with work.Work(question, tmp_path, parallel, force, None, lambda: None) as here:
            peaks = dict(zip((c.label for c in question.choices), (5e7, 3e7, 4e7), strict=True))
            here.measured = {label: {"memory": {"peak": peak}} for label, peak in peaks.items()}
            here.check_memory()

    check(1)
    check(2)
    check(3, force=True)
    with pytest.raises(InputError, match=r"largest 3 choices take .* --resume --parallel 2; --force"):
        check(3)
    for place in finals_of(tmp_path, question.choices[0], question.seeds):  # what is through takes nothing any more
        place.outcome.parent.mkdir(parents=True, exist_ok=True)
        place.outcome.write_text('{"status": "done"}')
    check(3)


def test_reports_are_rebuilt_and_merged(study: tuple[Path, dict[str, Any]], untuned: Comparison, tmp_path: Path):
    folder, _ = study
    again = rebuild([folder])
    assert again.out == folder
    assert json.loads((folder / "report.json").read_text())["choices"] == again.report["choices"]
    runs = rebuild(
        [folder / "runs" / name / seed for name in ("adamw", "sgd") for seed in ("seed-1", "seed-2")], tmp_path / "a"
    )
    assert finals(runs.report) == {
        name: {s: finals(again.report)[name][s] for s in (1, 2)} for name in ("adamw", "sgd")
    }
    assert choices(runs.report)["sgd"]["time"]["interleaved"] is False
    assert runs.report["analysis"]["choices"][1]["difference"] is not None
    both = rebuild([folder, untuned.out / "report.json"], tmp_path / "c")
    assert {"adamw", "sgd", "adamw (2)"} <= {*finals(both.report)}
    assert choices(both.report)["adamw (2)"]["time"]["ratio"] is None
    assert any("put together" in note.lower() for note in both.report["notes"])
    said = " ".join(s for part in both.report["analysis"]["summary"].values() for s in part)
    assert "tuned differently" in said
    assert "ran without tuning" in said
    assert "were not tuned here" not in said
    assert "did not finish" not in said
    assert "Held equal: tokens." in said
    twice = rebuild([tmp_path / "a", tmp_path / "a"], tmp_path / "d")
    assert finals(twice.report) == finals(runs.report)
    assert not any("same equal" in note for note in twice.report["notes"])
    with pytest.raises(InputError, match="holds neither"):
        rebuild([tmp_path])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="not the report"):
        rebuild([tmp_path / "other.json"])
    (tmp_path / "other.json").write_text('{"choices": [], "baseline": "adamw"}')
    with pytest.raises(InputError, match="lacks format, fallline"):
        rebuild([tmp_path / "other.json"])


def test_a_question_survives_the_disk(study: tuple[Path, dict[str, Any]]):
    folder, _ = study
    question = read_study(folder)
    assert type(question).from_mapping(json.loads(json.dumps(question.to_mapping()))) == question
    (folder / "study.json").with_name("other").mkdir()
    with pytest.raises(InputError, match="no comparison"):
        read_study(folder / "other")
    (folder / "other" / "study.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="damaged"):
        read_study(folder / "other")
    (folder / "other" / "study.json").write_text('{"format": 9}')
    with pytest.raises(InputError, match="format"):
        read_study(folder / "other")


@pytest.mark.slow
def test_equal_memory_gives_the_frugal_more_rows(recipe: Path, tmp_path: Path):
    found = compare(
        recipe,
        "steps=3",
        "model.preset=small",
        over=("optimizer=adamw,sgd",),
        equal="memory",
        out=tmp_path,
        progress=None,
    )
    adamw, sgd = (choices(found.report)[name] for name in ("adamw", "sgd"))
    assert sgd["recipe"]["batch"] > adamw["recipe"]["batch"] == 2
    assert sgd["steps"] == adamw["steps"] == 3
    assert abs(sgd["memory"]["peak"] / adamw["memory"]["peak"] - 1) < 0.15


@pytest.mark.slow
def test_equal_time_and_the_whole_catalogue(recipe: Path, tmp_path: Path):
    found = compare(recipe, over=("optimizer=all",), equal="time", parallel=2, out=tmp_path, progress=None)
    for choice in found.report["choices"]:
        options = fields(find("optimizer", choice["label"]).load().Config)
        if any(option.default is MISSING for option in options):  # what needs an answer is told, the rest compared
            assert "needs the option" in choice["error"]
            continue
        assert choice["status"] == "done", choice["error"]
        assert choice["steps"] == max(1, round(9 / choice["time"]["ratio"]))
