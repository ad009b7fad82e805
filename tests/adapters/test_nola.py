"""NOLA's sums of random matrices, which are never held together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fallline.adapters import attach, nola
from fallline.adapters.layers import adapted
from fallline.footprint import Shapes
from fallline.noise import rng

from .models import llama, logits, tokens

K, R = 10, 3


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nola, "BLOCK", 64)


def dense(bases: nola.Bases) -> torch.Tensor:
    """All of them [k, …], as they are meant."""
    per = max(1, 64 // (bases.shape[0] * bases.shape[1]))
    drawn = [
        torch.empty(min(per, K - i), *bases.shape).uniform_(-1, 1, generator=rng(bases.seed, 0, f"{bases.stream}/{i}"))
        for i in range(0, K, per)
    ]
    return torch.cat(drawn).double() / K**0.5


def test_value_and_gradients_are_those_of_all_matrices_at_once() -> None:
    model = attach(
        torch.nn.Sequential(torch.nn.Linear(9, 7)).double(), "nola", rank=R, bases=K, alpha=2.0, rslora=False
    )
    layer = adapted(model)["0"]
    P: Any = layer.adapters["default"]
    seed = int.from_bytes(int(v) for v in P.key)
    As, Bs = dense(nola.Bases(seed, "A", K, (R, 9))), dense(nola.Bases(seed, "B", K, (7, R)))
    assert 0.9 / K**0.5 < As.abs().max() < 1 / K**0.5
    assert len({*As.flatten().tolist(), *Bs.flatten().tolist()}) == 480, "none is another's"
    A0 = layer.methods["default"].pair(P)[0].detach()
    assert 0.2 < A0.abs().max() < 1 / 3
    for c in (P.a, P.b):
        assert not c.any()
        c.data.normal_(generator=torch.Generator().manual_seed(1))
    a, b = (c.detach().clone().requires_grad_() for c in (P.a, P.b))
    x = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    A, B = A0 + torch.einsum("k,krn->rn", a, As), torch.einsum("k,kmr->mr", b, Bs)
    wanted = x @ (layer.matrix() + 2 / R * B @ A).t() + model[0].bias
    y = model(x)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)  # the bases are float32's
    g = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(torch.autograd.grad(y, (P.a, P.b), g), torch.autograd.grad(wanted, (a, b), g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_derivatives_are_right_to_second_order() -> None:
    bases = nola.Bases(1, "A", K, (R, 9))
    c = torch.randn(K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: nola._Mix.apply(c, bases), (c,))
    assert torch.autograd.gradgradcheck(lambda c: nola._Mix.apply(c, bases).square(), (c,))


def test_the_random_matrices_are_never_held_together() -> None:
    number, size = 64, 20 * 30
    with Shapes() as held:
        c = torch.zeros(number, requires_grad=True)
        nola._Mix.apply(c, nola.Bases(1, "A", number, (20, 30))).square().sum().backward()
    assert c.grad is not None
    assert held.height < 4 * number * size / 4


def test_nothing_global_is_drawn_from_and_the_state_says_all() -> None:
    bases = [llama(), llama()]
    before = torch.get_rng_state()
    model, other = (attach(base, "nola", rank=R, bases=K, seed=seed) for seed, base in enumerate(bases))
    for layer in adapted(model).values():
        layer.adapters["default"].b.data.fill_(1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
    tuned = logits(model)
    assert (tuned - logits(llama())).abs().max() > 1e-3
    state = {name: t.to(torch.bfloat16) if name.endswith(".key") else t for name, t in model.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(logits(other), tuned)
