"""Our adapters under 🤗 Trainer and TRL's SFTTrainer: trained, resumed, and taken to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fallline import optim, schedules
from fallline.adapters import attach, follow, load, save

from . import test_plain_loop
from .test_trainer import MIDDLE, SETTINGS, curves, train
from .test_trl import PLAIN, finetune
from .tiny import FACTS, STEPS, assert_documented, assert_equal, rows, scheduled, tiny_llama, weights


def adapt(model, method, steps, loop, folder, seed=0):
    attach(model, "lora", rank=8, alpha=16, targets="all-linear", seed=seed)
    optimizer = optim.create(method, model, lr=1e-2)
    schedule = schedules.create("cosine", optimizer, steps=steps, warmup=2)
    trainer = loop(model, optimizer, schedule)
    save(model, folder)  # what PEFT loads
    return trainer


def run(
    which: str, tokenizer: PreTrainedTokenizerBase, method: str, seed: int, folder: Path, resume: Path | None = None
) -> tuple[nn.Module, list[Any]]:
    """Train a LoRA on the same base model; the model, and all that must be equal afterwards."""

    def loop(model: nn.Module, *ours: Any) -> Any:
        if which == "Trainer":
            return train(model, *ours, STEPS, Dataset.from_list(rows()), folder, resume, **SETTINGS)
        settings = SETTINGS | (PLAIN if which == "SFTTrainer in float32" else {})
        return finetune(model, tokenizer, *ours, STEPS, Dataset.from_list(FACTS), folder, resume, **settings)

    trainer = adapt(tiny_llama(vocab=len(tokenizer)), method, STEPS, loop, folder / "adapter", seed)
    logged = curves(trainer, "loss", "grad_norm", "learning_rate")
    assert len(logged) == STEPS
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # no autocast from here on
    return model, [weights(model), trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict(), logged]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1, 17).reshape(2, 8)).logits


@pytest.mark.parametrize(
    ("which", "method"),
    [("Trainer", "adamw"), ("Trainer", "scale"), ("SFTTrainer", "adamw"), ("SFTTrainer in float32", "scale")],
)
def test_trains_resumes_and_goes_to_peft(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, which: str, method: str
) -> None:
    model, whole = run(which, tokenizer, method, 0, tmp_path / "a")
    _, again = run(which, tokenizer, method, 1, tmp_path / "b", tmp_path / "a" / MIDDLE)
    assert_equal(again, whole)
    base = tiny_llama(vocab=len(tokenizer))
    assert_equal({name: p for name, p in whole[0].items() if ".adapters." not in name}, weights(base))
    assert whole[3][-1][0] < whole[3][0][0]

    before, after = logits(base), logits(model)
    assert (after - before).abs().max() > 0.05
    theirs = PeftModel.from_pretrained(tiny_llama(vocab=len(tokenizer)), str(tmp_path / "a" / "adapter"))
    assert torch.allclose(logits(theirs), after, atol=1e-5)
    assert torch.equal(logits(load(base, tmp_path / "a" / "adapter")), after)


@pytest.mark.parametrize(
    ("which", "dtype"), [("plain", torch.float32), ("plain", torch.bfloat16), ("Trainer", torch.float32)]
)
def test_what_a_method_does_after_each_update(tmp_path: Path, which: str, dtype: torch.dtype) -> None:
    """SoRA's thresholds, at a rate at which nothing else moves: they add up."""
    model = attach(tiny_llama(dtype=dtype), "sora", rank=4, threshold=0.1)
    gates = [p for name, p in model.named_parameters() if name.endswith(".gate")]
    before = torch.stack([p.detach().clone() for p in gates])
    optimizer = optim.create("sgd", model, lr=1e-9)
    follow(model, optimizer)
    if which == "plain":
        test_plain_loop.train(model, optimizer, scheduled(optimizer), test_plain_loop.updates()[:3], tmp_path / "file")
    else:
        train(model, optimizer, scheduled(optimizer), 3, Dataset.from_list(rows()), tmp_path, **SETTINGS)
    after = torch.stack([p.detach() for p in gates])
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, torch.nn.functional.softshrink(before, 0.3), rtol=0, atol=1e-6)
    assert torch.equal(after == 0, before.abs() < 0.3)
    assert (after == 0).sum() > 5


def test_the_page_shows_this_loop() -> None:
    assert_documented(adapt)
