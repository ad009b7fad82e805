"""Exports: loaded by the libraries they are for, compared with what was trained, and all or nothing."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fallline.cli.main import main
from fallline.drivers import export as exporting
from fallline.drivers.export import export
from fallline.errors import FalllineError, InputError, StorageError
from talkers import adapter_run, byte_tokenizer, full_run, save_model

IDS = torch.arange(3, 43)[None]


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    """A run of an adapter on the model in `base`."""
    save_model(tmp_path / "base", byte_tokenizer())
    adapter_run(tmp_path / "run", tmp_path / "base", corpus)
    return tmp_path / "run"


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def left(folder: Path) -> set[str]:
    """Everything in a folder, hidden or not."""
    return {path.name for path in folder.iterdir()}


def test_a_full_run_becomes_a_copy(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = full_run(tmp_path / "run", corpus)
    (tmp_path / "out").mkdir()  # an empty folder will do
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "every logit is equal, bit for bit" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(result.run.model))
    assert left(tmp_path / "out") == left(tmp_path / "run" / "model")
    assert left(tmp_path) == {"run", "out"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([40, 41]) != ""


def test_an_adapter_becomes_a_peft_folder(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "loaded again with PEFT" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    found = logits(PeftModel.from_pretrained(base, str(tmp_path / "out")))
    trained = exporting.open_trained(str(run)).model
    assert torch.allclose(found, logits(trained), atol=1e-5)
    assert (found - before).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_it_needs_no_adapter_library(tmp_path: Path, corpus: Path, dtype: torch.dtype) -> None:
    save_model(tmp_path / "base", byte_tokenizer())
    name = str(dtype).removeprefix("torch.")
    result = adapter_run(tmp_path / "run", tmp_path / "base", corpus, f"precision={name}")
    made = export(str(tmp_path / "run"), tmp_path / "deep" / "out", merge=True)
    assert made.kind == "merged model"
    assert 0 < made.difference <= made.allowed
    assert made.allowed == pytest.approx(exporting.TOLERANCE[dtype] * made.largest)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out")
    assert model.dtype == dtype
    assert len({path.stat().st_mode for path in (tmp_path / "deep" / "out").iterdir()}) == 1, "all can be read alike"
    assert (logits(model) - logits(result.run.model)).abs().max() <= made.allowed
    change = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)) - logits(result.run.model)
    assert change.abs().max() > 2 * made.allowed, "the base would not have passed"
    assert AutoTokenizer.from_pretrained(tmp_path / "deep" / "out").chat_template


def test_an_exported_adapter_can_be_merged_later(tmp_path: Path, run: Path) -> None:
    export(str(run), tmp_path / "adapter")
    export(str(tmp_path / "adapter"), tmp_path / "merged", merge=True)
    export(str(run), tmp_path / "at once", merge=True)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "at once"))
    assert one == other


def test_what_cannot_be_exported(tmp_path: Path, run: Path, corpus: Path) -> None:
    full_run(tmp_path / "full", corpus)
    (tmp_path / "file").write_text("mine")
    for name, out, merge, words in (
        ("run", "base", False, "base is there already and not empty"),
        ("run", "file", False, "file is there already"),
        ("full", "out", True, "full has no adapter to merge; leave out --merge"),
        ("base", "out", False, "base is no run, there is nothing to take out; copy it as it is$"),
        ("run/model", "out", False, "copy it as it is, or add --merge"),
    ):
        with pytest.raises(InputError, match=words):
            export(str(tmp_path / name), tmp_path / out, merge=merge)
    assert left(tmp_path) == {"base", "run", "full", "file"}
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_computes_something_else_is_removed(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting.TOLERANCE, torch.float32, 1e-12)
    with pytest.raises(FalllineError, match=r"does not compute what .*run does: a logit differs by") as caught:
        export(str(run), tmp_path / "out", merge=True)
    assert caught.value.exit_code == 1
    assert left(tmp_path) == {"base", "run"}


def test_an_adapter_that_got_lost_is_no_rounding(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exporting.TOLERANCE, torch.float32, 1.0)
    monkeypatch.setattr(exporting.adapters, "merge", lambda model: None)
    with pytest.raises(FalllineError, match="does not compute what"):
        export(str(run), tmp_path / "out", merge=True)
    assert left(tmp_path) == {"base", "run"}


@pytest.mark.parametrize("merge", [False, True])
def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, run: Path, merge: bool) -> None:
    with (run / "model" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors have changed"):
        export(str(run), tmp_path / "out", merge=merge)
    assert left(tmp_path) == {"base", "run"}


def test_the_leftovers_of_a_killed_export_are_cleared(tmp_path: Path, run: Path) -> None:
    (tmp_path / ".out.exporting").mkdir()
    (tmp_path / ".out.exporting" / "half").write_text("a model")
    export(str(run), tmp_path / "out")
    assert left(tmp_path) == {"base", "run", "out"}
    assert not (tmp_path / "out" / "half").exists()


@pytest.mark.parametrize("merge", [False, True])
def test_a_disk_that_refuses(tmp_path: Path, run: Path, merge: bool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # bytes of a file: less than the weights have
    try:
        with pytest.raises(
            StorageError, match=r"^exporting to .*out failed: File too large .*; nothing was left there$"
        ):
            export(str(run), tmp_path / "out", merge=merge)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left(tmp_path) == {"base", "run"}
