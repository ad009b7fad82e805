"""`fallline plan` as one types it, and the refusal of what cannot fit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3nTextConfig, LlamaConfig, MixtralConfig

from fallline.cli.main import main
from fallline.cli.plan import gib, size
from fallline.drivers.plan import check, forecast, setup_of
from fallline.drivers.plan.check import at_hand, bound, left_in, nearest
from fallline.drivers.plan.question import overrides, recipe_of
from fallline.drivers.setting import build
from fallline.drivers.train import train
from fallline.errors import InputError
from fallline.recipe import Recipe

from .models import config


def test_the_table(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "tiny", "--memory", "200MiB", "--length", "32", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "0.20 GiB of memory" in out
    assert "adamw-8bit" in out
    assert "Order: " in out


def test_the_models_own_parameters_are_told(capsys: pytest.CaptureFixture[str]):
    """Also where the first line has an adapter."""
    assert main(["plan", "tiny", "--memory", "55MiB", "--length", "32", "--batch", "1"]) == 0
    told, _, _, first, *_ = capsys.readouterr().out.splitlines()
    assert first.split()[2] == "lora"
    assert told.startswith("tiny: 8,995,968 parameters")


def test_json_has_every_byte(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "tiny", "--memory", "1GB", "--length", "32", "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"] == 10**9
    first = found["rows"][0]
    top = max(first["moments"].values(), key=lambda m: m["gradients"] + m["rest"])
    total = first["weights"] + first["optimizer_state"] + top["gradients"] + top["rest"] + first["overhead"]
    assert first["peak"] == pytest.approx(total, abs=5)


def test_one_combination_explained(capsys: pytest.CaptureFixture[str]):
    words = "optimizer=fira,rank=64,adapter=lora,rank=4,checkpointing=true,micro=1"
    assert main(["plan", "tiny", "--memory", "1GiB", "--length", "32", "--explain", words]) == 0
    out = capsys.readouterr().out
    assert "fira, adapter lora, float32, with checkpointing, 1 rows of 32 tokens" in out
    assert "← highest" in out
    assert "fits" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["plan", "tny"], "tiny"),
        (["plan", "tiny", "--memory", "lots"], "24GiB"),
        (["plan", "tiny", "--memory", "0GiB"], "24GiB"),
        (["plan", "tiny", "--memory", f"{'9' * 400}GiB"], "24GiB"),
        (["plan", "tiny", "--memory", "1GiB", "--length", "0"], "length"),
        (["plan", "tiny", "--memory", "1GiB", "--explain", "rank=3"], "name the method first"),
        (["plan", "tiny", "--memory", "1GiB", "--explain", "optimizer=fira,rnk=3"], "rank"),
        (["plan", "tiny", "--memory", "1GiB", "--explain", "optimizer"], "key=value"),
        (["plan", "tiny", "--memory", "1GiB", "--explain", "model=7b"], "give it as MODEL"),
        (["plan", "tiny", "--memory", "1GiB", "--explain", "optimizer=sgd,schedule=wsd"], "no effect on memory"),
        (["plan", "tiny", "--memory", "1GiB", "--explain", "optimizer=sgd", "--speed"], "one combination"),
        (["plan", "tiny", "--memory", "1GiB", "--device", "tpu"], "cpu or cuda"),
        (["plan", "tiny", "--memory", "1GiB", "--steps", "0"], "--steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_rows_longer_than_the_models_positions_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As `fallline train` would."""
    config("gpt2", 2).save_pretrained(tmp_path)
    for more in ([], ["--explain", "optimizer=sgd"]):
        assert main(["plan", str(tmp_path), "--memory", "1GiB", "--length", "1025", *more]) == 2
        assert "longer than the 1024 positions" in capsys.readouterr().err


def test_sizes():
    assert size("24GiB") == 24 * 2**30
    assert size("1.5 gb") == 1.5e9
    assert size("800") == 800
    assert gib(2**30) == "1.00"
    assert gib(0) == "0"


def test_options_belong_to_the_method_named_last():
    found = overrides(
        "optimizer=fira,rank=64,betas=[0.9, 0.99],adapter=lora,rank=8,checkpointing=true,precision=bfloat16"
    )
    assert found == [
        "optimizer=fira",
        "optimizer.rank=64",
        "optimizer.betas=[0.9, 0.99]",
        "adapter=lora",
        "adapter.rank=8",
        "model.checkpointing=true",
        "precision=bfloat16",
    ]


SHAPE = LlamaConfig(vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
TINY = "model: {name: llama, preset: tiny}\ndata: {name: python-docs, length: 32, vocab: 512}\nsteps: 2\nsample: 0\n"


def scarce(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(check, "at_hand", lambda device: free)
    monkeypatch.setattr(check, "thrift", lambda: False)  # it would stay so for all tests


def test_what_cannot_fit_is_refused_with_what_could(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = Recipe.parse(TINY + f"batch: 8\nout: {tmp_path / 'run'}", "data.length=256")
    scarce(monkeypatch, 25e6)
    with pytest.raises(
        InputError, match=r"needs about .* are free; these would fit: .*micro=[1-9].*checkpointing=true"
    ):
        train(recipe, progress=None)
    assert not (tmp_path / "run").exists()
    assert train(recipe, progress=None, force=True).run.step == 2


@pytest.mark.parametrize(("free", "force", "thrifty"), [(1e12, False, False), (150e6, False, True), (25e6, True, True)])
def test_where_memory_is_scarce_freed_blocks_are_given_back(
    free: float, force: bool, thrifty: bool, monkeypatch: pytest.MonkeyPatch
):
    """Above all where a run was begun that may not fit."""
    told: list[bool] = []
    scarce(monkeypatch, free)
    monkeypatch.setattr(check, "thrift", lambda: told.append(True) or True)
    build(Recipe.parse(TINY + "batch: 64"), check_memory=True, force=force)
    assert bool(told) == thrifty


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_thrift_leaves_nothing_behind():
    """In a process of its own: blocks of a megabyte, every second one freed; the rest keeps nothing of them."""
    code = (
        "import sys, torch\n"
        "from fallline.drivers.allocator import thrift\n"
        "from fallline.metrics import resident_memory\n"
        "assert thrift()\n"
        "torch.ones(1 << 18).sum()\n"
        "before = resident_memory()\n"
        "held = [torch.ones(1 << 18) for _ in range(200)]\n"
        "held = held[::2]\n"
        "print(resident_memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 95 << 20 < int(done.stdout) < 115 << 20


def test_what_is_named_fits_and_changes_no_more_than_it_must():
    setup = setup_of(Recipe.parse(TINY + "batch: 8"), SHAPE, "cpu")
    free = 0.6 * forecast(setup).peak
    found = [words for words, _ in nearest(setup, free, adapters=False)]
    assert len(found) > 1
    for words in found:
        again = setup_of(Recipe.parse(TINY + "batch: 8", *words), setup.shape, "cpu")
        assert forecast(again).peak <= free, words
    assert len({frozenset(word.partition("=")[0] for word in words) for words in found}) == len(found)
    assert nearest(setup, 1e6, adapters=False) == []


def test_adapters_are_named_for_models_that_have_weights():
    setup = setup_of(Recipe.parse(TINY + "batch: 1"), SHAPE, "cpu")
    free = 0.6 * forecast(setup).peak
    for adapters in (False, True):
        found = [word for words, _ in nearest(setup, free, adapters) for word in words]
        assert ("adapter=lora" in found) == adapters, found


def test_the_rough_bound_is_above_the_forecast():
    for name, words in (
        ("llama", []),
        ("gpt2", ["precision=bfloat16"]),
        ("qwen2", ["model.attention=eager", "optimizer=diffgrad"]),
    ):
        setup = setup_of(recipe_of(words, 128, 4), config(name, 3), "cpu")
        assert bound(setup) > forecast(setup).peak


def test_of_no_ordinary_architecture_is_there_a_rough_bound():
    """Parameters of experts are not in the arithmetic; layers of several widths are no number."""
    setup = setup_of(recipe_of([], 32, 2), config("llama"), "cpu")
    assert bound(setup) < math.inf
    for shape in (MixtralConfig(), Gemma3nTextConfig()):
        assert bound(replace(setup, shape=shape)) == math.inf


@pytest.mark.parametrize(
    ("limit", "used", "cached"),
    [("max", "current", "inactive_file"), ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")],
)
def test_a_containers_limit_counts_without_its_cache_of_files(tmp_path: Path, limit: str, used: str, cached: str):
    (tmp_path / f"memory.{limit}").write_text("8000\n")
    (tmp_path / f"memory.{used}").write_text("7000\n")
    (tmp_path / "memory.stat").write_text(f"inactive_anon 5\n{cached} 6000\n")
    assert left_in(tmp_path) == 7000


def test_no_limit_is_none(tmp_path: Path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7000\n")
    assert left_in(tmp_path) is None
    assert left_in(tmp_path / "elsewhere") is None


def test_the_memory_at_hand_is_known_here():
    found = at_hand(torch.device("cpu"))
    assert found is not None
    assert 1e8 < found < 1e14


@pytest.mark.slow
def test_a_comparison_lists_what_cannot_fit(tmp_path: Path):
    """In real processes."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY.replace("tiny", "7b"))
    argv = ["compare", str(recipe), "--over", "batch=8,16", "--out", str(tmp_path / "out"), "--quiet"]
    if (at_hand(torch.device("cpu")) or 0) > 60e9:
        pytest.skip("this machine has the memory")
    assert main(argv) == 2
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert all("memory are free" in choice["error"] for choice in found["choices"])
