"""LoRA-GGPO against its equations: the step ahead, its length, and that it is in training alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fallline.adapters import attach, follow
from fallline.adapters.layers import adapted
from fallline.optim import create

from .models import llama, logits, tokens


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    follow(model, optimizer)
    for _ in range(steps):
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_is_that_of_the_equations_with_adamws_own_moment() -> None:
    """The reference moves the weights ahead, takes the gradient, and moves them back, with norms over both layers."""
    torch.manual_seed(0)
    rho, beta, mu, s = 0.3, 0.7, 0.9, 4.0 / 2
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    attach(model, "ggpo", rank=2, alpha=4.0, rslora=False, rho=rho, momentum=mu, smoothing=beta)
    layers = [layer.adapters["default"] for layer in adapted(model).values()]
    ours = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02, (mu, 0.95), weight_decay=0.1)
    follow(model, ours)

    theta = [nn.Parameter(t.detach().clone()) for P in layers for t in (P.lora_A, P.lora_B)]
    weights = [(m.weight.detach(), m.bias.detach()) for m in (model[0], model[2])]
    theirs = torch.optim.AdamW(theta, 0.02, (mu, 0.95), weight_decay=0.1)
    x, target = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)

    def forward(at: list[torch.Tensor]) -> torch.Tensor:
        (W, b), (V, c) = weights
        return torch.tanh(x @ (W + s * at[1] @ at[0]).t() + b) @ (V + s * at[3] @ at[2]).t() + c

    smooth, plain = None, 0.0
    for _ in range(12):
        point = [t.detach().clone() for t in theta]
        if smooth is not None:
            moments = [theirs.state[t]["exp_avg"] for t in theta]
            length = math.sqrt(sum(float(m.square().sum()) for m in moments))
            point = [t + rho * m / length / smooth for t, m in zip(point, moments, strict=True)]
            away = math.sqrt(sum(float((a - b.detach()).square().sum()) for a, b in zip(point, theta, strict=True)))
            assert away == pytest.approx(rho / smooth, rel=1e-12)
        found = model.train()(x)
        torch.testing.assert_close(found, forward(point), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(model.eval()(x), forward([t.detach() for t in theta]), rtol=1e-11, atol=1e-11)
        plain = max(plain, float((found - model(x)).detach().abs().max()))
        point = [t.requires_grad_() for t in point]
        grads = torch.autograd.grad((forward(point) - target).square().mean(), point)
        (found - target).square().mean().backward()
        for t, g in zip(theta, grads, strict=True):
            t.grad = g
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        smooth = norm if smooth is None else beta * smooth + (1 - beta) * norm
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        for p, t in zip([t for P in layers for t in (P.lora_A, P.lora_B)], theta, strict=True):
            torch.testing.assert_close(p, t, rtol=1e-10, atol=1e-12)
        assert [float(P.norm) for P in layers] == pytest.approx([smooth] * 2, rel=1e-12)
    assert plain > 0.01, "the step ahead must be seen"


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_without_a_step_ahead_it_is_lora_to_the_bit(name: str) -> None:
    models = [attach(llama(), id, rank=4, dropout=0.2, **more) for id, more in (("ggpo", {"rho": 0.0}), ("lora", {}))]
    for model in models:
        torch.manual_seed(1)
        train(model, create(name, model, lr=1e-2), 3)
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert (logits(models[0]) - logits(llama())).abs().max() > 1e-3
    other = attach(llama(), "ggpo", rank=4, dropout=0.2, rho=0.1)
    torch.manual_seed(1)
    train(other, create(name, other, lr=1e-2), 3)
    assert not torch.equal(logits(other), logits(models[1]))


def test_a_step_without_gradients_changes_nothing() -> None:
    model = attach(llama(), "ggpo", rank=4)
    optimizer = create("adamw", model, lr=1e-2)
    follow(model, optimizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer.step()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()  # no direction: no step ahead
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if not k.endswith(("lora_A", "lora_B")))
