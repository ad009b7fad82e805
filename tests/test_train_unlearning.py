"""`fallline train` on what to forget and what to keep: to the end, and killed and resumed."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path

import pytest

from fallline import checkpoint
from launcher import Launcher, records, same_end
from mixtures import mixture
from talkers import byte_tokenizer

STEPS = 4


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    lines = {
        "forget": [(f"What is {i} plus {i % 7}?", f"It is {i + i % 7}.") for i in range(20)],
        "retain": [(f"What is the name of {i}?", f"It is named {i}.") for i in range(20)],
    }
    for name, pairs in lines.items():
        rows = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "refusals.txt").write_text("No idea.\n")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {name: llama, preset: tiny}\n"
        f"data: {{name: unlearning, forget: {tmp_path}/forget.jsonl, retain: {tmp_path}/retain.jsonl, length: 96, "
        "vocab: 300}\noptimizer: {name: adamw, lr: 3e-3}\n"
        f"steps: {STEPS}\nbatch: 6\nmicro: 2\nsample: 0\neval: {{every: 3}}\ncheckpoint: {{every: 1, keep: 2}}\n"
    )
    return path


def killed_and_resumed(fallline: Launcher, arguments: tuple[str, ...], out: Path) -> None:
    for attempt, die in enumerate(((checkpoint.POINTS[2], 2), None)):
        resume = ("--resume",) if attempt else ()
        ended = fallline(*arguments, f"out={out}", *resume, die_at=die)
        assert ended.code == (-signal.SIGKILL if die else 0), ended.output


def test_a_run_and_the_same_killed_and_resumed(fallline: Launcher, recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ("train", str(recipe), "objective=npo", "objective.keep=kl", "--quiet", "--force")
    ended = fallline(*arguments, f"out={whole}")
    assert ended.code == 0, ended.output
    found = records(whole)
    assert found[0]["val_loss"] == pytest.approx(20 * math.log(2), abs=1e-5), "the model is its own reference"
    assert found[1]["retain_kl"] == pytest.approx(0, abs=1e-6)
    assert found[-1]["val_loss"] < found[0]["val_loss"]
    assert found[-1]["forget_nll"] > found[1]["forget_nll"] + 0.3
    killed_and_resumed(fallline, arguments, killed)
    same_end(killed, whole)


def test_refusals_are_learned_and_what_is_missing_is_told(fallline: Launcher, recipe: Path, tmp_path: Path) -> None:
    arguments = ("train", str(recipe), "--quiet", "--force", "adapter=lora")
    refused = fallline(*arguments, "objective=flat", f"out={tmp_path / 'a'}")
    assert refused.code == 2
    assert "give data: {refusals: …}" in refused.output
    ended = fallline(
        *arguments, "objective=idk", f"data.refusals={tmp_path}/refusals.txt", f"out={tmp_path / 'b'}", "micro=6"
    )
    assert ended.code == 0, ended.output
    found = records(tmp_path / "b")
    assert found[-1]["refusal_nll"] < found[1]["refusal_nll"]
    assert found[-1]["retain_nll"] < found[1]["retain_nll"]


def test_an_attack_in_every_step_killed_and_resumed(fallline: Launcher, recipe: Path, tmp_path: Path) -> None:
    arguments = (
        "train", str(recipe), "--quiet", "--force", "objective=lat", "objective.steps=3", "objective.radius=1",
        "batch=4", f"data.refusals={tmp_path}/refusals.txt",
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = fallline(*arguments, f"out={whole}")
    assert ended.code == 0, ended.output
    found = records(whole)
    assert found[-1]["refusal_nll"] < found[1]["refusal_nll"]
    assert found[-1]["retain_nll"] < found[1]["retain_nll"]
    assert "forget_away" in found[1]
    killed_and_resumed(fallline, arguments, killed)
    same_end(killed, whole)


def test_one_expert_killed_and_resumed_and_its_export_is_whole(
    fallline: Launcher, recipe: Path, tmp_path: Path
) -> None:
    tokenizer, net = byte_tokenizer(), mixture(words=258)
    net.save_pretrained(tmp_path / "net")
    tokenizer.save_pretrained(tmp_path / "net")
    recipe.write_text(re.sub(r"^model: .*", f"model: {tmp_path}/net", recipe.read_text()).replace(", vocab: 300", ""))
    arguments = ("train", str(recipe), "--quiet", "--force", "objective={name: uoe, of: graddiff}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = fallline(*arguments, f"out={whole}")
    assert ended.code == 0, ended.output
    found = records(whole)
    layer, expert = (found[-1][name] for name in ("chosen_layer", "chosen_expert"))
    assert f"expert {expert} of 'model.layers.{layer}.mlp.experts' gets" in ended.output
    assert found[-1]["forget_nll"] > found[1]["forget_nll"]
    killed_and_resumed(fallline, arguments, killed)
    same_end(killed, whole)

    after, told = type(net).from_pretrained(whole / "model", output_loading_info=True)
    assert not any(told.values())
    for name, p in net.named_parameters():
        changed = [i for i, (a, b) in enumerate(zip(p, after.get_parameter(name), strict=True)) if not a.equal(b)]
        if f"layers.{layer}.mlp.experts." in name:
            assert changed == [expert]
        elif f"layers.{layer}.mlp.gate." not in name:
            assert not changed
