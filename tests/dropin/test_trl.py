"""Our optimizers and schedules in TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from .test_trainer import MIDDLE, SETTINGS, curves
from .tiny import FACTS, STEPS, assert_documented, assert_equal, made, tiny_llama, weights


def finetune(model, tokenizer, optimizer, schedule, steps, dataset, folder, resume=None, **settings):
    trainer = SFTTrainer(
        model,
        SFTConfig(folder, max_steps=steps, **settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


PLAIN = {"bf16": False, "gradient_checkpointing": False}  # TRL's defaults are both true


@pytest.mark.parametrize(
    ("optimizer", "schedule", "settings"),
    [("adamw", "wsd", {}), ("scale", "cosine", {}), ("muon", "linear", {}), ("stable-spam", "constant", PLAIN)],
)
def test_mid_epoch_resume_is_bit_identical(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, optimizer: str, schedule: str, settings: dict[str, Any]
) -> None:
    def run(seed: int, folder: Path, resume: Path | None = None) -> list[Any]:
        model = tiny_llama(seed, vocab=len(tokenizer))
        before = weights(model)
        ours = made(model, optimizer, schedule)
        dataset = Dataset.from_list(FACTS)
        trainer = finetune(model, tokenizer, *ours, STEPS, dataset, folder, resume, **SETTINGS, **settings)
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        logged = curves(trainer, "loss", "grad_norm", "learning_rate")
        assert len(logged) == STEPS
        return [weights(model), ours[0].state_dict(), ours[1].state_dict(), logged]

    whole = run(0, tmp_path / "a")
    assert whole[3][-1] < whole[3][0]
    assert_equal(run(1, tmp_path / "b", tmp_path / "a" / MIDDLE), whole)


def test_the_page_shows_this_loop() -> None:
    assert_documented(finetune)
