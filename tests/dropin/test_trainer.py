"""Our optimizers and schedules in 🤗 Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

import fallline
from fallline import optim
from fallline.errors import InputError
from fallline.optim.precision import low_precision
from fallline.optim.roles import DECAYED, roles

from .tiny import (
    ACCUMULATE,
    BATCH,
    LR,
    PAIRS,
    SCHEDULES,
    STEPS,
    assert_documented,
    assert_equal,
    made,
    rows,
    scheduled,
    tiny_llama,
    weights,
)


def train(model, optimizer, schedule, steps, dataset, folder, resume=None, **settings):
    arguments = TrainingArguments(folder, max_steps=steps, **settings)
    trainer = Trainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATE,
    "max_grad_norm": 0.2,
    "logging_steps": 1,
    "save_steps": 4,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
MIDDLE = "checkpoint-8"  # after update 2 of 6 of the second epoch


def curves(trainer: Trainer, *names: str) -> list[tuple[float, ...]]:
    """What was logged at each update."""
    return [tuple(line[name] for name in names) for line in trainer.state.log_history if "loss" in line]


def run(model: nn.Module, ours: tuple[Any, Any], folder: Path, resume: Path | None = None) -> list[Any]:
    """Train; all that must be equal afterwards."""
    trainer = train(model, *ours, STEPS, Dataset.from_list(rows()), folder, resume, **SETTINGS)
    assert trainer.state.global_step == STEPS
    logged = curves(trainer, "loss", "grad_norm", "learning_rate")
    assert len(logged) == STEPS
    assert max(norm for _, norm, _ in logged) > SETTINGS["max_grad_norm"]  # or nothing is clipped
    return [weights(model), ours[0].state_dict(), ours[1].state_dict(), logged]


KINDS = ("adamw", "adamw-8bit", "lanton", "muon", "scale")
"""torch's own; codes of 8 bits; a state of several parameters; rules by role; and a fast path, with every schedule. On
more 🤗 Trainer does not depend: that each goes through a file and comes back is tried in test_plain_loop.py."""


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [pytest.param(*pair, marks=() if pair[0] in KINDS else pytest.mark.slow) for pair in PAIRS],
)
def test_mid_epoch_resume_is_bit_identical(tmp_path: Path, optimizer: str, schedule: str) -> None:
    model, other = tiny_llama(), tiny_llama(seed=1)
    before = weights(model)
    whole = run(model, made(model, optimizer, schedule), tmp_path / "a")
    assert all(not torch.equal(p, before[name]) for name, p in whole[0].items())
    assert_equal(run(other, made(other, optimizer, schedule), tmp_path / "b", tmp_path / "a" / MIDDLE), whole)


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-stochastic"])
def test_bfloat16_weights_resume_bit_identically(tmp_path: Path, precision: Any) -> None:
    def in_bfloat16(seed: int) -> tuple[nn.Module, tuple[Any, Any]]:
        model = tiny_llama(seed, dtype=torch.bfloat16)
        optimizer = low_precision(lambda named: optim.create("adamw", named, lr=LR), model, precision=precision)
        return model, (optimizer, scheduled(optimizer))

    whole = run(*in_bfloat16(0), tmp_path / "a")
    assert_equal(run(*in_bfloat16(1), tmp_path / "b", tmp_path / "a" / MIDDLE), whole)


def test_pefts_own_adapters_resume_bit_identically(tmp_path: Path) -> None:
    def with_peft(seed: int) -> nn.Module:
        model = tiny_llama()
        set_seed(seed)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))

    model, other = with_peft(0), with_peft(1)
    whole = run(model, made(model, "muon"), tmp_path / "a")
    assert_equal(run(other, made(other, "muon"), tmp_path / "b", tmp_path / "a" / MIDDLE), whole)


def test_a_checkpoint_of_others_is_refused_in_one_line(tmp_path: Path) -> None:
    def torchs(model: nn.Module) -> tuple[Any, Any]:
        theirs = torch.optim.SGD(model.parameters(), lr=LR)
        return theirs, torch.optim.lr_scheduler.LinearLR(theirs)

    model = tiny_llama()
    run(model, torchs(model), tmp_path / "a")
    with pytest.raises(InputError, match="not of an optimizer of Fallline"):
        run(model, made(model, "sgd"), tmp_path / "b", tmp_path / "a" / MIDDLE)
    optimizer, _ = torchs(model)
    with pytest.raises(InputError, match="not of a schedule of Fallline"):
        run(model, (optimizer, scheduled(optimizer)), tmp_path / "b", tmp_path / "a" / MIDDLE)


def test_adamw_is_torchs_bit_for_bit(tmp_path: Path) -> None:
    def theirs(model: nn.Module) -> torch.optim.Optimizer:
        role = roles(model)
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (0.1, 0.0)]
        for name, p in model.named_parameters():
            groups[role[name] not in DECAYED]["params"].append(p)
        return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)

    def ours(model: nn.Module) -> torch.optim.Optimizer:
        return optim.create("adamw", model, lr=LR, weight_decay=0.1, betas=(0.9, 0.95))

    def trained(make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Any]:
        model = tiny_llama()
        optimizer = make(model)
        found = run(model, (optimizer, scheduled(optimizer)), tmp_path / make.__name__)
        return [found[0], found[3]]

    assert_equal(trained(ours), trained(theirs))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_update_has_the_rate_it_has_in_our_own_loop(tmp_path: Path, corpus: Path, schedule: str) -> None:
    recipe = fallline.Recipe.parse(
        f"data: {{name: text, path: {corpus}, length: 16, vocab: 300}}\nmodel: {{name: llama, preset: tiny}}\n"
        f"optimizer: {{name: scale, lr: {LR}}}\nschedule: {{name: {schedule}, warmup: 2}}\n"
        f"steps: {STEPS}\nbatch: 2\nsample: 0\neval: {{rows: 2}}\nout: {tmp_path / 'ours'}\n"
    )
    records = fallline.train(recipe, progress=None).metrics
    own = [record["lr"] for record in records if "lr" in record]
    model = tiny_llama()
    optimizer, plan = made(model, "scale", schedule)
    trainer = train(model, optimizer, plan, STEPS, Dataset.from_list(rows()), tmp_path / "theirs", **SETTINGS)
    logged = [lr for (lr,) in curves(trainer, "learning_rate")]
    assert logged == pytest.approx(own, rel=1e-6)  # our own record is rounded to float32
    assert logged[:2] == [LR / 2, LR]


def test_the_page_shows_this_loop() -> None:
    assert_documented(train)
