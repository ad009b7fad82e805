"""What is special to comp-sum: the named losses among its τ, its ends, and TRL's dft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fallline.data.documents import Document
from fallline.data.tokenizer import learned_tokenizer
from fallline.objectives.comp_sum import MOST, CompSum, Config, build

from .test_common import gradients, made

S = torch.logspace(-8, 3, 56, dtype=torch.float64)


def test_the_losses_that_have_names() -> None:
    p = torch.exp(-S)
    assert build(Config(tau=1)).rule is None  # cross-entropy itself
    near = S[S < 100]
    for tau in (1 - 1e-10, 1 + 1e-10):
        torch.testing.assert_close(CompSum(tau).of(near), near, rtol=1e-7, atol=0)
    torch.testing.assert_close(CompSum(2.0).of(S), -torch.expm1(-S))  # mean absolute error, 1 − p
    torch.testing.assert_close(CompSum(1.7).of(S[S > 0.1]), (1 - p[S > 0.1] ** 0.7) / 0.7)
    torch.testing.assert_close(CompSum(0.0).of(S[S < MOST]), torch.expm1(S[S < MOST]))  # 1/p − 1
    family = torch.stack([CompSum(tau).of(near) for tau in (0.7, 0.9, 1.2, 1.5, 2.0)])
    assert bool((family.diff(dim=0) <= 0).all())
    assert bool((family.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.3, 2.0])
def test_derivative_from_sure_to_hopeless(tau: float) -> None:
    """Over 50 000 words and with −log p up to a thousand, in float32: p^(τ−1) times that of cross-entropy, none past
    the clamp."""
    z = torch.randn(9, 50_000, generator=torch.Generator().manual_seed(0))
    z[:, 3] += torch.tensor([40, 20, 10, 0, -10, -25, -50, -300, -1000])
    y = torch.full((9, 1), 3)
    double = z.double()
    s = F.cross_entropy(double, y.squeeze(1), reduction="none")
    factor = torch.where((1 - tau) * s > MOST, 0, torch.exp((1 - tau) * s)).unsqueeze(1)
    wanted = factor * (double.softmax(1) - F.one_hot(y.squeeze(1), 50_000))
    value, g = CompSum(tau)(z.clone(), y, True)
    assert g is not None
    assert bool(value.isfinite().all())
    torch.testing.assert_close(value.double(), CompSum(tau).of(s), rtol=1e-3, atol=5e-5)  # a float32 sum of V terms
    torch.testing.assert_close(g.double(), wanted, rtol=1e-3, atol=5e-5)


def test_the_gradient_of_tau_two_is_that_of_trls_dft(tmp_path: Path) -> None:
    model = made(dtype=torch.float32)
    ids = torch.randint(1, 23, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = labels[2, 7:] = -100

    texts = ["one and one is two.", "two and two is four."]
    trainer = SFTTrainer(
        model,
        SFTConfig(tmp_path, loss_type="dft", report_to=[], bf16=False, use_cpu=True),
        train_dataset=Dataset.from_list([{"input_ids": row.tolist()} for row in ids]),
        processing_class=learned_tokenizer([Document(text, text) for text in texts], "dft", 280),
    )
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    theirs = gradients(trainer.compute_loss(model, inputs), model)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    batch = {"input_ids": ids, "labels": shifted, "example_id": torch.arange(3)}
    ours = build(Config(tau=2))(model, batch).value["comp-sum"].sum() / (shifted >= 0).sum()
    for got, want in zip(gradients(ours, model), theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
