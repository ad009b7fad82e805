"""`fallline train` as a user meets it: real processes, real text, real signals."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fallline import checkpoint
from fallline.cli.main import main
from fallline.contracts import Signals
from fallline.drivers.evaluation import evaluate
from fallline.drivers.setting import build
from fallline.drivers.train import Loop, interruptible, train
from fallline.errors import InputError
from fallline.metrics import Metrics, Trackers
from fallline.recipe import Recipe
from fallline.step import Run
from launcher import Launcher, records

STEPS = 24


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(
        "model: {name: llama, preset: tiny}\n"
        f"data: {{name: text, path: {corpus}, length: 32, vocab: 320, validation: 0.2}}\n"
        "optimizer: {name: scale, lr: 3e-3}\n"
        "schedule: {name: wsd, warmup: 3, decay: 8}\n"
        f"steps: {STEPS}\nbatch: 4\nmicro: 2\nclip: 1.0\nsample: 5\n"
        "eval: {every: 6, rows: 8}\n"
        "probes: [update-ratio, layer-grad-norm]\n"
        "checkpoint: {every: 3, keep: 2}\n"
    )
    return path


def final(out: Path) -> dict[str, bytes]:
    """Every file of the last checkpoint that holds state."""
    folder = checkpoint.find(out)[-1].path
    assert folder.name.endswith(str(STEPS))
    return {
        name: (folder / name).read_bytes() for name in ("model/model.safetensors", "state.safetensors", "state.json")
    }


def assert_same_run(one: Path, other: Path) -> None:
    assert records(one) == records(other)
    assert [r["step"] for r in records(one)] == list(range(STEPS + 1))
    a, b = final(one), final(other)
    for name in a:
        assert a[name] == b[name], name


@pytest.fixture(scope="module")
def whole(fallline: Launcher, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, to look at only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    ended = fallline("train", str(recipe), f"out={out}", "--quiet")
    assert ended.code == 0, ended.output
    return out


@pytest.fixture
def twin(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run, to try things on."""
    return Path(shutil.copytree(whole, tmp_path / "twin", symlinks=True))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `fallline train` here: what it says, in one line, when it refuses."""

    def run(*argv: str) -> str:
        assert main(["train", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("fallline: error: ")
        assert err.count("\n") == 1, err
        return err

    return run


def test_a_run_leaves_what_the_readme_says(fallline: Launcher, recipe: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    ended = fallline("train", str(recipe), f"out={out}", "steps=60", "eval.every=20")
    assert ended.code == 0, ended.output
    assert "validation loss" in ended.output
    assert "the model writes:" in ended.output
    assert {p.name for p in out.iterdir()} >= {"recipe.yaml", "run.json", "metrics.jsonl", "checkpoints", "model"}

    lines = records(out)
    assert [r["step"] for r in lines] == list(range(61))
    losses = [r["val_loss"] for r in lines if "val_loss" in r]
    assert len(losses) == 4
    assert abs(losses[0] - math.log(320)) < 0.3, "an untrained model knows nothing"
    assert losses[-1] < losses[0] - 0.5
    assert all(0 < r["update_ratio"] < 1 for r in lines if "update_ratio" in r)
    assert len(lines[1]["layer_grad_norm"]) > 10
    total = math.sqrt(sum(v * v for v in lines[1]["layer_grad_norm"].values()))
    assert total == pytest.approx(lines[1]["grad_norm"], rel=1e-5)

    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer("The assert statement", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert tokenizer.decode(ids[0]) == "The assert statement"

    record = json.loads((out / "run.json").read_text())
    assert set(record["versions"]) >= {"torch", "transformers"}
    assert len(record["data"]["sha256"]) == len(record["model"]["sha256"]) == 64
    assert record["threads"] == 1
    assert record["recipe"] == Recipe.load(recipe, f"out={out}", "steps=60", "eval.every=20").to_mapping()
    text = (out / "run.json").read_text()
    assert "FALLLINE_CACHE" not in text
    assert "environ" not in text


def test_killed_anywhere_and_resumed_it_ends_the_same(
    fallline: Launcher, recipe: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = ("train", str(recipe), f"out={out}", "--quiet")
    chance = random.Random(7)
    first = fallline(*arguments, die_at=(checkpoint.POINTS[2], 2))
    assert first.code == -signal.SIGKILL
    deaths = 1
    for attempt in range(13):  # four times inside a save, then at random, at last not at all
        die_at = (checkpoint.POINTS[4 * attempt % len(checkpoint.POINTS)], 1) if attempt < 4 else None
        at_random = (signal.SIGKILL, chance.uniform(0.1, 0.9)) if 4 <= attempt < 12 else None
        ended = fallline(*arguments, "--resume", die_at=die_at, signal_after=at_random)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.output
        deaths += 1
    assert ended.code == 0
    assert deaths >= 5
    assert_same_run(whole, out)


@pytest.mark.slow
def test_killed_at_every_point_and_resumed_twice(fallline: Launcher, recipe: Path, whole: Path, tmp_path: Path) -> None:
    for number, point in enumerate(checkpoint.POINTS):
        for occurrence in (1, 3):
            out = tmp_path / f"killed-{number}-{occurrence}"
            arguments = ("train", str(recipe), f"out={out}", "--quiet")
            first = fallline(*arguments, die_at=(point, occurrence))
            assert first.code == -signal.SIGKILL, (point, first.output)
            second = fallline(*arguments, "--resume", die_at=(point, 1))
            assert second.code == -signal.SIGKILL, (point, second.output)
            third = fallline(*arguments, "--resume")
            assert third.code == 0, (point, third.output)
            assert_same_run(whole, out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_saves_and_resumes(
    fallline: Launcher, recipe: Path, whole: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "signalled"
    arguments = ("train", str(recipe), f"out={out}", "--quiet")
    ended = fallline(*arguments, "checkpoint.every=1", signal_when=(number, out / "checkpoints" / "step-00000002"))
    assert ended.code == code, ended.output
    assert "interrupted and saved after step" in ended.output
    assert checkpoint.latest_good(out) is not None
    ended = fallline("train", str(out), "--resume", "--quiet", "checkpoint.every=3")
    assert ended.code == 0, ended.output
    assert_same_run(whole, out)


def test_a_run_without_out_gets_the_next_free_folder_and_resumes_from_anywhere(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = Recipe.load(recipe, "steps=2", "schedule=constant", "sample=0")
    assert [train(loaded, progress=None).out for _ in range(2)] == [
        Path("runs/mine-scale-1"),
        Path("runs/mine-scale-2"),
    ]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = train(Recipe.load(tmp_path / "runs" / "mine-scale-2"), resume=True, progress=None)
    assert again.run.step == 2
    with pytest.raises(InputError, match="--resume needs the run's folder"):
        train(loaded, resume=True, progress=None)


class Stopper:
    """A part that has seen enough after two steps."""

    def after_step(self, run: Run, signals: Signals) -> tuple[()]:
        if run.step == 1:
            run.stop("seen enough")
        return ()


def test_a_run_that_stopped_itself_stays_stopped(recipe: Path, tmp_path: Path) -> None:
    def loop() -> Loop:
        setting = build(Recipe.load(recipe))
        setting.run.parts["stopper"] = Stopper()
        return Loop(setting, tmp_path, Metrics(tmp_path / "metrics.jsonl"), Trackers({}), None)

    first = loop()
    first.begin(None)
    while not first.done:
        first.step()
    first.end()
    assert first.metrics.read()[-1]["stopped"] == "seen enough"
    again = loop()
    again.begin(checkpoint.latest_good(tmp_path))
    assert again.done
    assert (again.run.step, again.run.stopped) == (2, "seen enough")


def test_resuming_a_finished_run_changes_nothing(fallline: Launcher, recipe: Path, whole: Path, twin: Path) -> None:
    ended = fallline("train", str(recipe), f"out={twin}", "--resume", "--quiet")
    assert ended.code == 0, ended.output
    assert_same_run(whole, twin)


def test_micro_batches_do_not_change_the_run(recipe: Path, tmp_path: Path) -> None:
    changed = ("steps=6", "clip=null", "schedule=constant")
    runs = [
        train(Recipe.load(recipe, f"micro={m}", f"out={tmp_path / str(m)}", *changed), progress=None) for m in (1, 3, 4)
    ]
    for other in runs[1:]:
        for a, b in zip(runs[0].metrics, other.metrics, strict=True):
            for key in ("loss", "val_loss", "grad_norm"):
                if key in a:
                    assert a[key] == pytest.approx(b[key], rel=2e-4)


def test_a_checkpoint_is_only_tensors_and_json(whole: Path) -> None:
    folder = checkpoint.find(whole)[-1].path
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert not [f for f in files if not f.endswith((".safetensors", ".json", ".jinja"))]
    assert load_file(folder / "model" / "model.safetensors")


def test_keeps_the_newest_and_the_best(whole: Path) -> None:
    saved = checkpoint.find(whole)
    assert len(saved) <= 3
    best = min((r["val_loss"], r["step"]) for r in records(whole) if "val_loss" in r and r["step"])
    assert best[1] in [s.step for s in saved]


BAD: list[tuple[str, list[str], str]] = [
    ("method", ["optimizer=skale"], "unknown optimizer 'skale'; did you mean 'scale'?"),
    ("key", ["optimizer.learning_rate=1"], "has no option 'learning_rate'"),
    ("section", ["optimiser=adamw"], "unknown key 'optimiser'; did you mean 'optimizer'?"),
    ("type", ["steps=many"], "'steps' must be a whole number"),
    ("nan", ["optimizer.lr=.nan"], "'lr' must be a finite number"),
    ("negative", ["optimizer.lr=-1"], "'lr' must be above 0"),
    ("zero", ["batch=0", "micro=null"], "'batch' must be above 0"),
    ("preset", ["model.preset=huge"], "'preset' must be one of"),
    ("device", ["device=cuda:77"], "device 'cuda:77' is not available here"),
    ("device name", ["device=toaster"], "device 'toaster' is not available here"),
    ("precision", ["precision=int8"], "'precision' must be one of"),
    ("missing data", ["data.path=nowhere.txt"], "nowhere.txt"),
    ("missing recipe", [], "no recipe file"),
    ("warm-up", ["schedule.warmup=500"], "warmup"),
    ("tracker", ["tracker=spreadsheet"], "spreadsheet"),
    ("unwritable", ["out=/proc/nothing/here"], "cannot write"),
    ("resume nothing", ["--resume"], "nothing to resume"),
    ("length", ["model={name: llama, preset: tiny}", "data.length=1000000"], "1000000"),
]


@pytest.mark.parametrize(("what", "arguments", "message"), BAD, ids=[b[0] for b in BAD])
def test_bad_input_is_one_line_and_writes_nothing(
    refused: Callable[..., str], recipe: Path, tmp_path: Path, what: str, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    path = str(recipe) if what != "missing recipe" else str(recipe) + "x"
    own = [] if any(a.startswith("out=") for a in arguments) else [f"out={out}"]
    assert message in refused(path, *own, *arguments)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"   \n", b"too short", b"bin\x00ary" * 1000, b"\xff\xfe\xfa" * 1000])
def test_bad_data_files(refused: Callable[..., str], recipe: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    said = refused(str(recipe), f"out={tmp_path / 'out'}", f"data.path={path}")
    assert "data.txt" in said or "token" in said
    assert not (tmp_path / "out").exists()


def test_another_run_is_never_overwritten(
    refused: Callable[..., str], recipe: Path, whole: Path, twin: Path, tmp_path: Path
) -> None:
    assert "already holds a run; add --resume" in refused(str(recipe), f"out={twin}")
    said = refused(str(recipe), f"out={twin}", "optimizer.lr=1e-2", "--resume")
    assert "optimizer.lr was 0.003, is 0.01" in said
    assert "step-00000024" in said, "the last good checkpoint is named"
    assert final(twin) == final(whole)
    other = tmp_path / "notes"
    other.mkdir()
    (other / "diary.txt").write_text("dear diary")
    assert "is not empty and holds no run" in refused(str(recipe), f"out={other}")
    assert [p.name for p in other.iterdir()] == ["diary.txt"]


def test_a_damaged_record_is_told(refused: Callable[..., str], recipe: Path, twin: Path) -> None:
    for text in ("", "{}", '{"recipe": {}}', "[1]"):
        (twin / "run.json").write_text(text)
        assert "run.json is damaged" in refused(str(recipe), f"out={twin}", "--resume")


def test_changed_data_is_noticed(fallline: Launcher, recipe: Path, tmp_path: Path, corpus: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(corpus, own)
    out = tmp_path / "out"
    ended = fallline(
        "train", str(recipe), f"out={out}", f"data.path={own}", "--quiet", die_at=(checkpoint.POINTS[-1], 2)
    )
    assert ended.code == -signal.SIGKILL
    (own / "assert.txt").write_text("something else entirely " * 50)
    ended = fallline("train", str(recipe), f"out={out}", f"data.path={own}", "--resume")
    assert ended.code == 2
    assert "data: the content is not the one the run began with" in ended.output


def test_a_damaged_checkpoint_is_passed_over(fallline: Launcher, recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    arguments = ("train", str(recipe), f"out={out}", "--quiet")
    assert fallline(*arguments, die_at=("begin", 5)).code == -signal.SIGKILL
    newest = checkpoint.find(out)[-1].path
    target = newest / "state.safetensors"
    damaged = bytearray(target.read_bytes())
    damaged[-1] ^= 1
    target.write_bytes(damaged)
    ended = fallline(*arguments, "--resume")
    assert ended.code == 0, ended.output
    assert newest.name in ended.output, "the damaged one is named"
    assert_same_run(whole, out)


def test_another_thread_count_is_said(fallline: Launcher, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "threads"
    arguments = ("train", str(recipe), f"out={out}", "--quiet")
    assert fallline(*arguments, "threads=2", die_at=("begin", 2)).code == -signal.SIGKILL
    ended = fallline(*arguments, "threads=1", "--resume")
    assert ended.code == 0
    assert "not bit-identically: threads 2 then, 1 now" in ended.output


def test_not_finite_stops_before_the_update(fallline: Launcher, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "nan"
    ended = fallline(
        "train",
        str(recipe),
        f"out={out}",
        "--quiet",
        "optimizer={name: sgd, lr: 1e30}",
        "clip=null",
        "checkpoint.every=1",
    )
    assert ended.code == 3, ended.output
    assert "stopped before the update" in ended.output
    assert "example ids" in ended.output
    assert checkpoint.latest_good(out) is not None
    assert all(math.isfinite(r["loss"]) for r in records(out) if "loss" in r)


def test_two_processes_do_not_share_a_folder(recipe: Path, fallline: Launcher, twin: Path) -> None:
    with checkpoint.lock(twin):
        ended = fallline("train", str(recipe), f"out={twin}", "--resume")
    assert ended.code == 2
    assert "another process" in ended.output


def test_evaluation_leaves_the_run_as_it_was(recipe: Path, tmp_path: Path) -> None:
    setting = build(Recipe.load(recipe))
    state = torch.random.get_rng_state()
    first = evaluate(setting.run, setting.dataset.validation, 8)
    assert first == evaluate(setting.run, setting.dataset.validation, 8)
    assert torch.equal(state, torch.random.get_rng_state())
    assert setting.run.model.training
    assert all(p.grad is None for p in setting.run.model.parameters())


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as interrupted:
        assert interrupted() is None
        signal.raise_signal(signal.SIGTERM)
        assert interrupted() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_who_watches_may_end_the_run(recipe: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(record: Mapping[str, Any]) -> str:
        seen.append(record["step"])
        return "seen enough" if record.get("val_loss", 9.0) < 9.0 and record["step"] == 6 else ""

    loaded = Recipe.load(recipe, f"out={tmp_path / 'out'}", "threads=1")
    result = train(loaded, progress=None, watch=watch)
    assert seen == list(range(7))
    assert result.run.stopped == "seen enough"
    assert result.metrics[-1]["stopped"] == "seen enough"
    assert (tmp_path / "out" / "model").exists()
    again = train(loaded, resume=True, progress=None, watch=watch)
    assert seen == list(range(7)), "it is over"
    assert again.run.stopped == "seen enough"
