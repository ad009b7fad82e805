"""`fallline score`: tiny runs of real text, and what becomes of their scores."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fallline import checkpoint
from fallline.cli.main import main
from fallline.contracts import Draw
from fallline.data.scores import read_scores
from fallline.drivers.score import score, write
from fallline.drivers.train import train
from fallline.drivers.trained import open_trained
from fallline.errors import InputError
from fallline.noise import rng
from fallline.recipe import Recipe
from fallline.token_errors import token_errors
from fallline.tokens import IGNORED, token_losses
from launcher import Launcher
from talkers import adapter_run, byte_tokenizer, full_run, save_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, own_cache: Path) -> list[Path]:
    """Two full runs of different seeds on two of the files."""
    folder = tmp_path_factory.mktemp("runs")
    few = f"data.path={[str(p) for p in sorted(corpus.iterdir())[:2]]}"
    for seed in (0, 1):
        full_run(folder / str(seed), corpus, few, f"seed={seed}")
    return [folder / "0", folder / "1"]


def alone(run: Path, by: str, examples: list[int]) -> Tensor:
    """Scores one example at a time, each in a row of its own, by autograd."""
    recipe = Recipe.load(run)
    source = recipe.data.module.build(recipe.data.options, None).train
    model = open_trained(str(run)).model
    return torch.stack([scored(model, source, by, i) for i in examples])


def scored(model: Any, source: Any, by: str, example: int) -> Tensor:
    batch = source(Draw(torch.tensor([example]), torch.ones(1)), rng(0, 0, ""))
    number = (batch["labels"] != IGNORED).sum()
    if by == "el2n":
        return token_errors(model, batch).sum() / number
    value = token_losses(model, batch).sum() / number
    if by == "loss":
        return value.detach()
    grads = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])
    return torch.stack([g.pow(2).sum() for g in grads]).sum().sqrt()


@pytest.mark.parametrize("by", ["el2n", "grand", "loss"])
def test_the_average_over_runs(runs: list[Path], by: str) -> None:
    found = score([str(run) for run in runs], by, rows=30).values
    picked = found.isfinite().nonzero().squeeze(1)[::29].tolist()
    expected = torch.stack([alone(run, by, picked) for run in runs]).mean(0)
    torch.testing.assert_close(found[picked], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(score([str(run) for run in runs], by, rows=17).values, found, equal_nan=True)


def test_score_then_train(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "the scores.safetensors"
    argv = ["score", *map(str, runs), "--by", "el2n", "--out", str(out)]
    assert main(argv) == 0
    typed = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
    assert typed[:2] == ["fallline", "train"]
    with safe_open(out, framework="pt") as file:
        told = file.metadata()
    recipe = Recipe.load(runs[0], *typed[3:], f"out={tmp_path / 'pruned'}")
    dataset = recipe.data.module.build(recipe.data.options, None)
    scores = read_scores(out, dataset.train)
    known = scores[scores.isfinite()].double()
    assert told["data"] == dataset.fingerprint
    assert json.loads(told["runs"]) == list(map(str, runs))
    assert (float(told["mean"]), float(told["sd"])) == pytest.approx(
        (known.mean().item(), known.std(correction=0).item()), rel=1e-5
    )
    assert 0 < known.min() <= known.max() <= 2**0.5
    result = train(recipe, progress=None)
    assert result.run.step == 6
    before = out.read_bytes()
    assert main(argv) == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {out.name, "pruned"}


def test_a_pruned_run_resumes_exactly_and_only_with_its_scores(
    runs: list[Path], tmp_path: Path, fallline: Launcher
) -> None:
    file, whole, killed = tmp_path / "scores", tmp_path / "whole", tmp_path / "killed"
    write(score([str(runs[0])], "loss"), file)
    argv = ["train", str(runs[0]), "--quiet", "sampler=data-diet", f"sampler.scores={file}", "checkpoint.every=2"]
    assert fallline(*argv, f"out={whole}").code == 0
    assert fallline(*argv, f"out={killed}", die_at=(checkpoint.POINTS[0], 2)).code == -signal.SIGKILL
    bytes_before = file.read_bytes()
    file.unlink()
    write(score([str(runs[0])], "el2n"), file)
    ended = fallline("train", str(killed), "--resume", "--quiet")
    assert ended.code == 2, ended.output
    assert "the scores are not those that the run began with" in ended.output
    assert len(ended.output.strip().splitlines()) == 1
    file.write_bytes(bytes_before)
    ended = fallline("train", str(killed), "--resume", "--quiet")
    assert ended.code == 0, ended.output
    for name in ("model/model.safetensors", "state.safetensors", "state.json"):
        one, other = (checkpoint.find(run)[-1].path / name for run in (whole, killed))
        assert one.parts[-3:] == other.parts[-3:]
        assert one.read_bytes() == other.read_bytes(), name


def test_only_what_an_adapter_run_trained_counts(tmp_path: Path, corpus: Path) -> None:
    save_model(tmp_path / "base", byte_tokenizer())
    few = f"data.path={[str(p) for p in sorted(corpus.iterdir())[:2]]}"
    result = adapter_run(tmp_path / "run", tmp_path / "base", corpus, few)
    found = score([str(tmp_path / "run")], "grand").values
    assert len(result.run.trainable()) < len(list(result.run.model.parameters()))
    picked = range(0, len(found), 9)
    model = result.run.model.eval()
    expected = torch.stack([scored(model, result.run.source, "grand", i) for i in picked])
    torch.testing.assert_close(found[::9], expected, rtol=1e-4, atol=1e-6)


def test_what_is_refused(runs: list[Path], tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(runs[0])
    full_run(tmp_path / "other", corpus)
    with pytest.raises(InputError, match="have different training examples"):
        score([first, str(tmp_path / "other")], "loss")
    with pytest.raises(InputError, match="given twice"):
        score([first, f"{first}/."], "loss")
    with pytest.raises(InputError, match="is not the folder of a run"):
        score([str(tmp_path)], "loss")
    with pytest.raises(InputError, match="at least 1 row"):
        score([first], "loss", rows=0)
    with pytest.raises(InputError, match="did you mean 'el2n'"):
        score([first], "el2")
    record = tmp_path / "other" / "run.json"
    record.write_text(record.read_text().replace('"sha256": "', '"sha256": "0', 1))
    with pytest.raises(InputError, match="has changed since it was trained"):
        score([str(tmp_path / "other")], "loss")
    assert main(["score", first, "--by", "loss", "--out", str(tmp_path / "no" / "file")]) == 2
    assert "cannot write a file" in capsys.readouterr().err
