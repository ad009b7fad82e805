"""`fallline train` on pairs: to the end, and killed, with what the reference said deleted in between."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest

from fallline import checkpoint
from launcher import Launcher, records, same_end

STEPS = 6


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    lines = [
        {"prompt": f"What is {i} plus {i % 7}?", "chosen": f"It is {i + i % 7}." * (1 + i % 2), "rejected": "No idea."}
        for i in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {name: llama, preset: tiny}\n"
        f"data: {{name: preference, path: {tmp_path}/pairs.jsonl, length: 96, vocab: 300, validation: 0.2}}\n"
        "objective: dpo\noptimizer: {name: adamw, lr: 1e-3}\n"
        f"steps: {STEPS}\nbatch: 4\nmicro: 2\nsample: 0\neval: {{every: 3}}\ncheckpoint: {{every: 1, keep: 2}}\n"
    )
    return path


@pytest.mark.parametrize(("adapter", "kills"), [("none", (3, 2)), ("lora", (3,))])
def test_a_run_and_the_same_killed_and_resumed(
    fallline: Launcher, recipe: Path, tmp_path: Path, own_cache: Path, adapter: str, kills: tuple[int, ...]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ("train", str(recipe), f"adapter={adapter}", "--quiet", "--force")
    ended = fallline(*arguments, f"out={whole}")
    assert ended.code == 0, ended.output
    found = records(whole)
    assert found[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6), "the model is its own reference"
    assert found[-1]["val_loss"] < 0.5
    assert found[-1]["reward_accuracy"] > 0.9
    assert {"chosen_logp", "rejected_logp", "reward_margin"} <= found[-1].keys()

    for attempt, occurrence in enumerate((*kills, None)):
        shutil.rmtree(own_cache / "reference")
        die = None if occurrence is None else (checkpoint.POINTS[2], occurrence)
        resume = ("--resume",) if attempt else ()
        ended = fallline(*arguments, f"out={killed}", *resume, die_at=die)
        assert ended.code == (-signal.SIGKILL if die else 0), ended.output
    same_end(killed, whole)
