"""SoRA against its equations: the gate, the proximal step, and the ranks that are left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from fallline.adapters import attach, follow, save
from fallline.adapters.layers import adapted
from fallline.adapters.sora import soft_threshold
from fallline.drivers.setting import build
from fallline.optim import create
from fallline.recipe import Recipe
from fallline.step import take_step

from .models import llama, logits, tokens

R = 6


def gates(model: Any) -> torch.Tensor:
    return torch.stack([layer.adapters["default"].gate.detach().clone() for layer in adapted(model).values()])


def train(model: Any, steps: int) -> None:
    optimizer = create("adamw", model, lr=1e-2)
    follow(model, optimizer)
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_threshold_is_the_proximal_step() -> None:
    """The minimum of ½ (z − g)² + ξ |z|, searched on a fine grid; 0.15 is where released code gives 0."""
    g = torch.tensor([-2.0, -0.3, -0.1, -0.05, 0.0, 0.1, 0.15, 0.25, 1.0], dtype=torch.float64)
    grid = torch.arange(-25000, 25001, dtype=torch.float64) / 1e4
    best = grid[((grid - g[:, None]) ** 2 / 2 + 0.1 * grid.abs()).argmin(1)]
    torch.testing.assert_close(soft_threshold(g, 0.1), best, rtol=0, atol=1e-4)
    assert soft_threshold(g, 0.1)[2:6].tolist() == [0, 0, 0, 0]


def test_value_and_gradients_are_the_equations() -> None:
    torch.manual_seed(0)
    model = attach(torch.nn.Sequential(torch.nn.Linear(9, 7)).double(), "sora", rank=R, alpha=3.0, rslora=False)
    layer = adapted(model)["0"]
    P: Any = layer.adapters["default"]
    assert 0.1 < P.gate.abs().mean() < 3
    P.lora_B.data.normal_()
    A, B, gate, W = (t.detach().clone() for t in (P.lora_A, P.lora_B, P.gate, layer.matrix()))
    x, g = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    y = model(x)
    s = 3.0 / R
    torch.testing.assert_close(y, x @ (W + s * B @ gate.diag() @ A).t() + model[0].bias, rtol=1e-12, atol=1e-12)
    y.backward(g)
    G = g.t() @ x
    torch.testing.assert_close(P.gate.grad, s * (B.t() @ G @ A.t()).diag(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(P.lora_B.grad, s * G @ A.t() * gate, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(P.lora_A.grad, s * gate[:, None] * (B.t() @ G), rtol=1e-11, atol=1e-11)


def test_with_open_gates_and_a_tiny_threshold_it_is_lora() -> None:
    """With gates that are not trained, so that both stay one and the same."""
    ours, theirs = (
        attach(llama().double(), id, rank=R, **more) for id, more in (("sora", {"threshold": 1e-15}), ("lora", {}))
    )
    for layer in adapted(ours).values():
        gate = layer.adapters["default"].gate.requires_grad_(False)
        gate.fill_(1)
    for model in (ours, theirs):
        train(model, 4)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-9, atol=1e-9)
    assert (logits(ours) - logits(llama().double())).abs().max() > 0.05


def test_optimizers_do_not_decay_gates() -> None:
    optimizer = create("adamw", attach(llama(), "sora", rank=R), lr=1e-3, weight_decay=0.1)
    decays = {len(group["params"]): group["weight_decay"] for group in optimizer.param_groups if group["params"]}
    assert decays == {14: 0.0, 28: 0.1}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_takes_the_step_after_each_update(corpus: Path, precision: str) -> None:
    """At a rate at which nothing else moves the thresholds add up."""
    recipe = Recipe.parse(
        f"model: {{name: llama, preset: tiny}}\ndata: {{name: text, path: {corpus}, length: 16, vocab: 320}}\n"
        f"adapter: {{name: sora, rank: {R}, threshold: 0.1}}\noptimizer: {{name: sgd, lr: 1e-9}}\n"
        f"steps: 3\nbatch: 2\nmicro: 1\nprecision: {precision}\n"
    )
    run = build(recipe).run
    before = gates(run.model)
    for _ in range(3):
        take_step(run)
    torch.testing.assert_close(gates(run.model), torch.nn.functional.softshrink(before, 0.3), rtol=0, atol=1e-6)
    assert torch.equal(gates(run.model) == 0, before.abs() < 0.3)


def test_a_larger_threshold_leaves_fewer_ranks_and_what_is_shut_is_not_saved(tmp_path: Path) -> None:
    left = []
    for threshold in (1e-3, 0.05, 0.2, 0.3):
        model = attach(llama(), "sora", rank=R, threshold=threshold)
        train(model, 5)
        if threshold == 0.3:
            next(iter(adapted(model).values())).adapters["default"].gate.data.zero_()  # a layer without a rank
        ranks = (gates(model) != 0).sum(1)
        left.append(int(ranks.sum()))
        tuned = logits(model)
        save(model, tmp_path / str(threshold))
        stored = load_file(tmp_path / str(threshold) / "adapter_model.safetensors")
        found = [len(stored[f"base_model.model.{path}.lora_A.weight"]) for path in adapted(model)]
        assert found == ranks.clamp(min=1).tolist()
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / str(threshold))
        torch.testing.assert_close(logits(theirs), tuned, rtol=0, atol=1e-6)
    assert len(adapted(model)) * R == left[0] > left[1] > left[2] > left[3]
    assert ranks.min() == 0 < ranks.max() < R
    assert (tuned - logits(llama())).abs().max() > 1e-2
