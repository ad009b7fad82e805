"""LoRA-GA's beginning against its equations, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fallline.adapters import attach
from fallline.adapters.begin import Begin
from fallline.adapters.layers import adapted
from fallline.errors import InputError

from .models import gpt2, llama, tokens
from .table import batches

R, GAMMA, ALPHA = 3, 16.0, 8.0


def begun(make: Any = llama) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model in float64 with the adapter, and the gradient [m, n] of each adapted weight on the data."""
    model = make().double().eval()
    loss = torch.stack([model(**batch).loss for batch in batches()]).mean()
    names = dict(model.named_parameters())
    true = {n: torch.autograd.grad(loss, p, retain_graph=True)[0] for n, p in names.items() if p.dim() == 2}
    attach(model, "lora-ga", rank=R, data=batches(), gamma=GAMMA, alpha=ALPHA)
    turned = make is gpt2
    return model, {path: true[f"{path}.weight"].t() if turned else true[f"{path}.weight"] for path in adapted(model)}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_and_b_are_the_gradients_singular_vectors(make: Any) -> None:
    model, gradients = begun(make)
    assert gradients
    for path, G in gradients.items():
        P: Any = adapted(model)[path].adapters["default"]
        U, _, Vh = torch.linalg.svd(G)
        m = len(G)
        size = math.sqrt(m) / GAMMA
        eye = torch.eye(R, dtype=torch.float64)
        A, B = P.lora_A.detach(), P.lora_B.detach()
        torch.testing.assert_close(A @ A.t(), size * eye, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(B.t() @ B, size * eye, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(A.t() @ A / size, Vh[:R].t() @ Vh[:R], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(B @ B.t() / size, U[:, R : 2 * R] @ U[:, R : 2 * R].t(), rtol=1e-6, atol=1e-6)
        assert torch.equal(P.start_A, A)
        assert torch.equal(P.start_B, B)


def test_the_first_step_of_descent_is_the_best_change_of_rank_2r() -> None:
    model, gradients = begun()
    layers = adapted(model)
    before = {path: [t.detach().clone() for t in layers[path].adapters["default"].parameters()] for path in layers}
    torch.stack([model(**batch).loss for batch in batches()]).mean().backward()
    rate = 1e-3
    s = ALPHA / math.sqrt(R)
    for path, G in gradients.items():
        P: Any = layers[path].adapters["default"]
        A, B = before[path]
        change = s * (-rate * P.lora_B.grad @ A + B @ (-rate * P.lora_A.grad))
        U, S, Vh = torch.linalg.svd(G)
        best = (U[:, : 2 * R] * S[: 2 * R]) @ Vh[: 2 * R]
        wanted = -rate * s**2 * math.sqrt(len(G)) / GAMMA * best
        torch.testing.assert_close(change, wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max()))


def test_it_descends_further_than_lora_from_the_same_data_and_rate() -> None:
    def after(id: str, **more: Any) -> float:
        model = attach(llama().double(), id, rank=R, **more)
        ids = tokens(rows=4)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(20):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    assert after("lora-ga", data=batches()) < after("lora") - 0.02


def test_a_rank_that_a_weight_does_not_have_is_refused() -> None:
    model = llama()
    with pytest.raises(InputError, match=r"one of 32 × 32 has 32; 'rank' may be 16 there"):
        attach(model, "lora-ga", rank=17, data=batches())
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_that_is_used_elsewhere_is_refused() -> None:
    with pytest.raises(InputError, match=r"begins from gradients of the weights, and .* is used in two places"):
        attach(llama(), "lora-ga", rank=2, targets="lm_head", data=batches())


@pytest.mark.parametrize("id", ["lora-ga", "lora-sb"])
@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (float("nan"), r"the gradient of model\.layers\.\d\..* on the data to begin from is not finite"),
        (0.0, "all are zero on the data to begin from: no token of it is a label"),
    ],
)
def test_gradients_that_say_nothing_are_refused(id: str, factor: float, message: str) -> None:
    """The loss is finite; what comes back from the head is not, or nothing."""
    model = llama()
    model.lm_head.register_full_backward_pre_hook(lambda _, grad: (grad[0] * factor,))
    with pytest.raises(InputError, match=message):
        attach(model, id, rank=2, data=batches())
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_private_run_is_refused() -> None:
    run: Any = SimpleNamespace(model=attach(llama(), "lora-ga", rank=2, data=batches()), estimator=SimpleNamespace())
    Begin().check(run)
    run.estimator.secret = 1
    with pytest.raises(InputError, match="'lora-ga' begins from the data, which the guarantee of a private run does"):
        Begin().check(run)
