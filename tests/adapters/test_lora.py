"""LoRA against its equations, in float64, and what its options do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fallline.adapters import attach
from fallline.adapters.layers import adapted
from fallline.adapters.lora import Config, Lora
from fallline.catalog import find
from fallline.errors import InputError

from .models import fit, llama, logits, state


def layer(**options: Any) -> tuple[torch.nn.Sequential, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5)).double()
    attach(model, "lora", **options)
    P: Any = adapted(model)["0"].adapters["default"]
    return model, P


def test_the_model_is_the_same_to_the_bit_before_training() -> None:
    before = logits(llama())
    assert torch.equal(logits(attach(llama(), "lora", rank=4)), before)


@pytest.mark.parametrize(("rslora", "s"), [(True, 6 / math.sqrt(3)), (False, 6 / 3)])
def test_value_and_gradients_follow_the_equations(rslora: bool, s: float) -> None:
    model, P = layer(rank=3, alpha=6, rslora=rslora)
    noise = torch.Generator().manual_seed(1)
    P.lora_B.data.normal_(generator=noise)
    x, g = (torch.randn(4, k, dtype=torch.float64, generator=noise) for k in (7, 5))
    W, b, A, B = model[0].weight, model[0].bias, P.lora_A, P.lora_B
    y = model(x)
    torch.testing.assert_close(y, x @ (W + s * B @ A).t() + b, rtol=1e-12, atol=1e-12)
    y.backward(g)
    G = g.t() @ x  # ∂L/∂W of the dense layer
    torch.testing.assert_close(A.grad, s * B.t() @ G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(B.grad, s * G @ A.t(), rtol=1e-12, atol=1e-12)
    assert W.grad is None
    assert b.grad is None


def test_the_first_gradient_of_a_is_zero_and_that_of_b_is_not() -> None:
    model, P = layer(rank=2)
    model(torch.randn(3, 7, dtype=torch.float64)).sum().backward()
    assert not P.lora_A.grad.any()
    assert bool(P.lora_B.grad.all())


def test_a_begins_uniform_within_one_over_the_root_of_n() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(400, 3))
    A = adapted(attach(model, "lora", rank=50))["0"].adapters["default"].lora_A.detach()
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert abs(A.std().item() / (bound / math.sqrt(3)) - 1) < 0.02
    assert abs(A.mean().item()) < 5 * bound / math.sqrt(3 * A.numel())


def test_the_beginning_depends_on_seed_and_layer_alone() -> None:
    a, b, c = attach(llama(), "lora"), attach(llama(), "lora", targets="q_proj"), attach(llama(), "lora", seed=1)
    name = "model.layers.1.self_attn.q_proj.adapters.default.lora_A"
    assert torch.equal(state(a)[name], state(b)[name])
    assert not torch.equal(state(a)[name], state(c)[name])
    assert not torch.equal(state(a)[name], state(a)[name.replace("layers.1", "layers.0")])


def test_dropout_hides_inputs_from_the_adapter_in_training_only() -> None:
    model, P = layer(rank=2, dropout=0.5)
    P.lora_B.data.fill_(1.0)
    x = torch.ones(2000, 7, dtype=torch.float64)
    model.eval()
    still = model(x)
    model.train()
    torch.manual_seed(0)
    moved = model(x)
    assert not torch.equal(still, moved)
    torch.testing.assert_close(moved.mean(0), still.mean(0), rtol=0.1, atol=0.1)


def test_every_option_changes_what_is_trained() -> None:
    def result(**options: Any) -> dict[str, torch.Tensor]:
        model = attach(llama(), "lora", **options)
        fit(model, steps=3)
        return {k: v for k, v in state(model).items() if "lora" in k}

    plain = result()
    others = {"rank": 4, "alpha": 4.0, "rslora": False, "dropout": 0.3, "targets": "q_proj"}
    assert set(others) == set(Config.__dataclass_fields__)
    for key, value in others.items():
        found = result(**{key: value})
        assert found.keys() != plain.keys() or any(
            found[k].shape != plain[k].shape or not torch.equal(found[k], plain[k]) for k in plain
        ), key


def test_the_trained_parameters_are_r_times_m_plus_n() -> None:
    model = attach(llama(), "lora", rank=3)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 3 * sum(sum(layer.matrix().shape) for layer in adapted(model).values())


def test_impossible_options_are_refused() -> None:
    for options, message in (
        ({"rank": 0}, "'rank' must be above 0"),
        ({"dropout": 1.0}, "'dropout'"),
        ({"ranks": 4}, "did you mean 'rank'"),
    ):
        with pytest.raises(InputError, match=message):
            attach(llama(), "lora", **options)


def test_the_plain_way_agrees_with_the_fused_one() -> None:
    method = find("adapter", "lora").load().build(Config(rank=2))
    assert isinstance(method, Lora)
    P: Any = torch.nn.Module()
    P.lora_A, P.lora_B = torch.randn(2, 7), torch.randn(5, 2)
    x, W, b = torch.randn(3, 7), torch.randn(5, 7), torch.randn(5)
    fused = method.linear(P, x, lambda: W, b, training=False)
    plain = super(Lora, method).linear(P, x, lambda: W, b, training=False)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(plain - x @ W.t() - b, x @ method.delta(P, lambda: W).t())
