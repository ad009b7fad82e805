"""`fallline train` with an adapter: what is trained, saved, resumed and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fallline import checkpoint
from fallline.drivers.evaluation import evaluate
from fallline.drivers.setting import build
from fallline.drivers.train import train
from fallline.errors import InputError
from fallline.recipe import Recipe
from fallline.step import take_step

from .models import stop_at

STEPS = 8


def recipe(base: Path, corpus: Path, out: Path, *more: str) -> Recipe:
    text = (
        f"model: {base}\n"
        "adapter: {name: lora, rank: 4}\n"
        f"data: {{name: text, path: {corpus}, length: 32, validation: 0.2}}\n"
        "optimizer: {name: adamw, lr: 1e-2}\n"
        f"steps: {STEPS}\nbatch: 4\nclip: 1.0\nsample: 0\nout: {out}\n"
        "eval: {every: 4, rows: 4}\ncheckpoint: {every: 3, keep: 9}\n"
    )
    return Recipe.parse(text, *more)


def state(folder: Path) -> dict[str, bytes]:
    last = checkpoint.find(folder)[-1].path
    return {p.name: p.read_bytes() for p in sorted(last.rglob("*")) if p.is_file() and p.name != "manifest.json"}


def test_a_run_trains_saves_and_exports_the_adapter_alone(base: Path, corpus: Path, tmp_path: Path) -> None:
    result = train(recipe(base, corpus, tmp_path / "run"), progress=None)
    assert result.metrics[-1]["val_loss"] < result.metrics[0]["val_loss"]
    folder = tmp_path / "run" / "model"
    files = {p.name for p in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not any(name.startswith("model") for name in files)
    saved = checkpoint.find(tmp_path / "run")[-1].path
    in_state = load_file(saved / "state.safetensors")
    assert all(".adapters." in name for name in in_state if name.startswith("run/model/"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    trained = sum(p.numel() for p in result.run.model.parameters() if p.requires_grad)
    assert record["model"]["trained"] == trained < record["model"]["parameters"] / 5
    assert sum(p.stat().st_size for p in saved.rglob("*.safetensors")) < 5 * 4 * trained
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1, "others may read all of it or nothing"
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        ours = result.run.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    assert (plain - ours).abs().max() > 0.1


def test_an_interrupted_run_resumes_to_the_same_bits_twice(base: Path, corpus: Path, tmp_path: Path) -> None:
    train(recipe(base, corpus, tmp_path / "whole"), progress=None)
    out = tmp_path / "cut"

    for resume, step in ((False, 5), (True, 7)):
        with pytest.raises(KeyboardInterrupt):
            train(recipe(base, corpus, out), resume=resume, progress=None, watch=stop_at(step))
    train(Recipe.load(out), resume=True, progress=None)
    assert state(out) == state(tmp_path / "whole")


def test_another_base_model_is_refused_on_resume(base: Path, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(copy)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).write_bytes((base / name).read_bytes())
    train(recipe(copy, corpus, tmp_path / "run"), progress=None)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(copy)
    with pytest.raises(InputError, match="model: the content is not the one the run began with"):
        train(recipe(copy, corpus, tmp_path / "run"), resume=True, progress=None)


def test_full_fine_tuning_is_the_default(base: Path, corpus: Path, tmp_path: Path) -> None:
    run = build(recipe(base, corpus, tmp_path / "a", "adapter=none")).run
    assert not run.given
    assert all(p.requires_grad for p in run.model.parameters())
    assert Recipe.parse(f"model: {base}\ndata: python-docs\nsteps: 1\n").adapter.id == "none"


@pytest.mark.parametrize("more", [("micro=1",), ("model.checkpointing=true",), ("batch=2", "micro=2")])
def test_the_gradient_does_not_depend_on_how_it_is_computed(
    base: Path, corpus: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    batch = next((m for m in more if m.startswith("batch")), "batch=4")
    rule = ("optimizer=sgd", "optimizer.lr=1")  # Adam makes whole steps of what rounding leaves of a zero
    plain, other = (build(recipe(base, corpus, tmp_path / "a", batch, *rule, *options)).run for options in ((), more))
    for run in (plain, other):
        for _ in range(2):
            take_step(run)
    for (name, p), q in zip(plain.trainable().items(), other.trainable().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "scale", "muon", "stable-spam"])
def test_every_optimizer_trains_an_adapter(base: Path, corpus: Path, tmp_path: Path, optimizer: str) -> None:
    rate = "1" if optimizer == "sgd" else "1e-2"
    setting = build(recipe(base, corpus, tmp_path / "a", f"optimizer={optimizer}", f"optimizer.lr={rate}"))
    run, held_out = setting.run, setting.dataset.validation
    assert {group["role"] for group in run.optimizer.param_groups if group["params"]} == {"adapter"}
    before = evaluate(run, held_out, 16)
    for _ in range(STEPS):
        take_step(run)
    assert evaluate(run, held_out, 16) < before


def test_marks_hold_the_adapter_alone(base: Path, corpus: Path, tmp_path: Path) -> None:
    run = build(recipe(base, corpus, tmp_path / "a")).run
    run.mark("here")
    take_step(run)
    before = {name: p.detach().clone() for name, p in run.trainable().items()}
    assert run.marks["here"]["model"].keys() == before.keys()
    take_step(run)
    run.rewind("here")
    take_step(run)
    assert all(torch.equal(p, before[name]) for name, p in run.trainable().items())


def test_a_thawed_base_weight_is_saved_from_then_on(base: Path, corpus: Path, tmp_path: Path) -> None:
    from fallline.contracts import Change

    run = build(recipe(base, corpus, tmp_path / "a")).run
    name = "model.norm.weight"
    p = dict(run.model.named_parameters())[name]
    assert name in run.given
    p.requires_grad_(True)
    run.remap([Change(name, None, p)])
    assert name in run.state_dict()["model"]


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-stochastic"])
def test_a_float32_adapter_on_a_bfloat16_model_resumes(
    base: Path, corpus: Path, tmp_path: Path, precision: str
) -> None:
    few = ("steps=3", f"precision={precision}", "checkpoint.every=2")
    train(recipe(base, corpus, tmp_path / "whole", *few), progress=None)

    def stop(record: Any) -> str:
        if record["step"] == 3:
            raise KeyboardInterrupt
        return ""

    with pytest.raises(KeyboardInterrupt):
        train(recipe(base, corpus, tmp_path / "cut", *few), progress=None, watch=stop)
    result = train(Recipe.load(tmp_path / "cut"), resume=True, progress=None)
    assert state(tmp_path / "cut") == state(tmp_path / "whole")
    kinds = {p.dtype for name, p in result.run.model.named_parameters() if "adapters" in name}
    assert kinds == {torch.float32}
    assert result.run.model.dtype == torch.bfloat16


def test_an_unknown_adapter_or_option_is_named() -> None:
    for wrong, message in (
        ("adapter: lorra", "unknown adapter 'lorra'; did you mean 'lora'"),
        ("adapter: {name: lora, r: 4}", "adapter 'lora' has no option 'r'"),
        ("adapter: {rank: 4}", "adapter 'none' has no option 'rank'"),
    ):
        with pytest.raises(InputError, match=message):
            Recipe.parse(f"model: {{name: llama, preset: tiny}}\ndata: python-docs\nsteps: 1\n{wrong}\n")
