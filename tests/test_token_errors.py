"""EL2N of tokens against one-hot vectors, and against the gradient norm of a linear softmax model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from fallline.per_example import Norms, PerExample
from fallline.token_errors import error_norms, token_errors
from fallline.tokens import IGNORED, linear_of_labels

WORDS = 30
TINY: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_hot_errors(logits: Tensor, labels: Tensor) -> Tensor:
    asked = labels != IGNORED
    away = logits.softmax(-1) - F.one_hot(labels.clamp(min=0), logits.shape[-1])
    return away.norm(dim=-1) * asked


@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
def test_equal_to_one_hot_and_to_the_closed_form(chunk: int | None) -> None:
    h, W, b = normal(4, 7, 6), normal(WORDS, 6, seed=1), normal(WORDS, seed=2)
    y = torch.arange(28).view(4, 7) % WORDS
    y[1, 2:5] = IGNORED
    found, z = linear_of_labels(h, W, y, error_norms, bias=b, chunk=chunk), F.linear(h, W, b)
    torch.testing.assert_close(found, one_hot_errors(z, y), rtol=1e-13, atol=0)
    asked = y != IGNORED
    p = z.softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    closed = (1 - 2 * p + ((2 * z).logsumexp(-1) - 2 * z.logsumexp(-1)).exp()).sqrt()
    torch.testing.assert_close(found[asked], closed[asked], rtol=1e-9, atol=0)
    assert not found[~asked].any()


def test_between_zero_and_the_root_of_two() -> None:
    z = torch.tensor([[200.0, 0, 0], [0, 200, 0], [0, 0, 0], [8, 0, 0]])
    found = error_norms(z, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found[:3], torch.tensor([0.0, 2**0.5, (2 / 3) ** 0.5]))
    sure = error_norms(z[3:].double(), torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(found[3:].double(), sure, rtol=1e-3, atol=0)  # nothing is lost where p is almost 1
    assert (error_norms(100 * normal(500, 9), torch.arange(500) % 9) <= 2**0.5 + 1e-12).all()


@pytest.mark.parametrize(
    "config", [LlamaConfig(**TINY), Gemma2Config(**TINY, final_logit_softcapping=2.0)], ids=["chunks", "full logits"]
)
def test_of_a_model(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    g = torch.Generator().manual_seed(3)
    batch = {k: torch.randint(WORDS, (3, 7), generator=g) for k in ("input_ids", "labels")}
    batch["labels"][0, 2:4] = IGNORED
    found = token_errors(model, batch)
    assert not found.requires_grad
    expected = one_hot_errors(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)


def test_the_gradient_of_a_linear_softmax_model_is_error_times_input() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, WORDS).double()
    x, y, norms = normal(20, 6), torch.arange(20), Norms()
    with PerExample(model).watch(20, norms):
        z = model(x)
        F.cross_entropy(z, y, reduction="sum").backward()
    length = torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1).norm(dim=1)
    torch.testing.assert_close(norms.total().sqrt(), error_norms(z.detach(), y) * length, rtol=1e-12, atol=0)
