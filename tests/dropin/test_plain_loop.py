"""Our optimizers and schedules in a loop that knows nothing of us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from fallline import schedules
from fallline.errors import InputError

from .tiny import BATCH, PAIRS, STEPS, assert_documented, assert_equal, made, rows, tiny_llama, weights


def train(model, optimizer, schedule, updates, checkpoint):
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        done = saved["done"]
    for batches in updates[done:]:  # each update may accumulate over several batches
        for batch in batches:
            loss = model(**batch).loss / len(batches)
            loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    torch.save({name: part.state_dict() for name, part in state.items()} | {"done": len(updates)}, checkpoint)


def updates() -> list[list[dict[str, torch.Tensor]]]:
    """STEPS updates over two batches each."""
    found = rows(STEPS * 2 * BATCH)
    batches = [
        {key: torch.tensor([row[key] for row in found[i : i + BATCH]]) for key in ("input_ids", "labels")}
        for i in range(0, len(found), BATCH)
    ]
    return [batches[i : i + 2] for i in range(0, len(batches), 2)]


@pytest.mark.parametrize(("optimizer", "schedule"), PAIRS)
def test_resume_is_bit_identical(tmp_path: Path, optimizer: str, schedule: str) -> None:
    def run(updates: list[Any], checkpoint: str, seed: int) -> tuple[Any, ...]:
        model = tiny_llama(seed)
        before = weights(model)
        ours = made(model, optimizer, schedule)
        train(model, *ours, updates, tmp_path / checkpoint)
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        return weights(model), ours[0].state_dict(), ours[1].state_dict()

    whole = run(updates(), "whole", seed=0)
    run(updates()[:7], "halves", seed=0)
    assert_equal([*run(updates(), "halves", seed=1)], [*whole])  # other weights at first: all comes from the file


def test_a_schedule_in_one_line() -> None:
    optimizer = torch.optim.SGD(tiny_llama().parameters(), lr=0.5)
    schedule = schedules.create("linear", optimizer, steps=4, warmup=0)
    assert schedule.get_last_lr() == [0.5]
    for wrong, said in (
        (lambda: schedules.create("cosin", optimizer, steps=4), "cosine"),
        (lambda: schedules.create("cosine", optimizer, steps=4, flor=0.1), "floor"),
        (lambda: schedules.create("cosine", optimizer, steps=4, warmup=9), "'warmup' is 9 steps of a run of 4"),
    ):
        with pytest.raises(InputError, match=said):
            wrong()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_to_import_them_is_light() -> None:
    code = "import sys; from fallline import optim, schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_shows_this_loop() -> None:
    assert_documented(train)
