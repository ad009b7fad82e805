"""What the three loops train: a tiny real Llama, a few rows, and what must be equal afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from fallline import optim, schedules
from fallline.catalog import entries
from fallline.noise import rng

STEPS, BATCH, ACCUMULATE, LR = 12, 2, 2, 1e-2
ROWS = 21  # 11 batches, hence 6 updates an epoch, the last of one batch
DOCS = Path(__file__).parents[2] / "docs" / "dropin.md"

OPTIMIZERS = [id for kind, id in entries() if kind == "optimizer"]
SCHEDULES = [id for kind, id in entries() if kind == "schedule"]
PAIRS = [(id, "cosine") for id in OPTIMIZERS] + [("scale", id) for id in SCHEDULES if id != "cosine"]

#: What brings out state that the defaults would hide in so short a run.
OPTIONS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 4, "refresh_every": 5},
    "lanton": {"alpha": 1.0, "noise_momentum": 0.9},
    "sgd": {"momentum": 0.9},
    "stable-spam": {"reset_every": 5, "weight_decay": 0.1},
}

FACTS = [{"prompt": f"{a} and {b} is", "completion": f" {a + b}."} for a in range(7) for b in range(3)]


def tiny_llama(seed: int = 0, vocab: int = 64, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """23 thousand parameters; more with a larger vocabulary."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def rows(number: int = ROWS, length: int = 16) -> list[dict[str, list[int]]]:
    """Random walks on the token ids, so that there is something to learn."""
    steps = torch.randint(1, 4, (number, length), generator=rng(0, 0, "dropin"))
    ids = (steps.cumsum(1) % 64).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def scheduled(optimizer: torch.optim.Optimizer, schedule: str = "cosine") -> Any:
    return schedules.create(schedule, optimizer, steps=STEPS, warmup=2)


def made(model: nn.Module, optimizer: str, schedule: str = "cosine") -> tuple[Any, Any]:
    """The two arguments that are ours."""
    found = optim.create(optimizer, model, lr=LR, **OPTIONS.get(optimizer, {}))
    return found, scheduled(found, schedule)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Nested dicts and lists, tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert [*one] == [*other], where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_documented(loop: Callable[..., Any]) -> None:
    """The page for users shows the code that the tests run."""
    assert dedent(inspect.getsource(loop)) in DOCS.read_text(encoding="utf-8")
