"""What is special to LANTON: noise and what it does to a layer's rate, kinds of layers, sizes of steps, norms."""

from __future__ import annotations

from collections import Counter
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fallline.catalog import find
from fallline.errors import InputError
from fallline.noise import rng
from fallline.optim import create
from fallline.optim.layerwise import absolute_sum, nuclear, scaled_norm

from .parameters import make, parameters, train, values
from .table import ROWS

OPTIONS = next(row.options for row in ROWS if row.id == "lanton")
NEEDED = {"alpha": 5.0, "noise_momentum": 0.9}


def random(*shape: int, step: int = 0, stream: str = "x") -> Tensor:
    return torch.randn(shape, generator=rng(0, step, stream), dtype=torch.float64)


def noises(optimizer: Any) -> dict[str, float]:
    """H of every parameter."""
    return {name: s["layerrate"]["noise"].item() for name, s in optimizer.state_dict()["state"].items()}


def shares(optimizer: Any) -> dict[str, float]:
    """√(a/max a) of every parameter, by the docstring, kinds told by the state."""
    states = optimizer.state_dict()["state"]
    a = {name: 1 / sqrt(1 + h / OPTIONS["alpha"] ** 2) for name, h in noises(optimizer).items()}
    kinds = {name: ("orthogonalise" in s, "sign" in s) for name, s in states.items()}
    top = {kind: max(a[name] for name in a if kinds[name] == kind) for kind in kinds.values()}
    return {name: sqrt(a[name] / top[kinds[name]]) for name in a}


def test_noise_slows_layers_on_the_inputs_of_the_common_tests():
    """Else the test of the equation would not see it: none at the first update, then always, not always the same."""
    params = parameters()
    optimizer = make("lanton", params, OPTIONS)
    train(optimizer, params, 0, 1)
    assert set(noises(optimizer).values()) == {0.0}
    leaders, slowed = Counter(), 0
    for step in range(1, 50):
        train(optimizer, params, step, step + 1)
        found = shares(optimizer)
        leaders.update(name for name, share in found.items() if share == 1)
        slowed += sum(share < 0.9 for share in found.values())
    assert sum(leaders.values()) == 3 * 49
    assert len(leaders) > 3
    assert slowed > 100


def test_needed_options_have_no_default():
    with pytest.raises(InputError, match="alpha"):
        find("optimizer", "lanton").load().Config.from_mapping({}, "optimizer 'lanton'")


def pair(noise: float, steps: int = 30, **options: Any) -> tuple[nn.Parameter, nn.Parameter, Any, list[float]]:
    """Two equal layers, the second with so much noise in its gradient: how far each moved in the last update."""
    p, q = (nn.Parameter(torch.zeros(12, 8, dtype=torch.float64)) for _ in range(2))
    optimizer = create("lanton", [("0.weight", p), ("1.weight", q)], lr=1.0, **NEEDED | options)
    moved = [0.0, 0.0]
    for step in range(steps):
        before = p.detach().clone(), q.detach().clone()
        G = random(12, 8) + 0.1 * random(12, 8, step=step, stream="both")
        p.grad, q.grad = G, G + noise * random(12, 8, step=step, stream="second")
        optimizer.step()
        moved = [(x.detach() - y).norm().item() for x, y in zip((p, q), before, strict=True)]
    return p, q, optimizer, moved


def test_the_noisier_of_two_layers_is_slower_and_the_other_has_the_full_rate():
    _, _, base, full = pair(0.0)
    assert noises(base)["0.weight"] == noises(base)["1.weight"] > 0
    assert full[0] == full[1] == pytest.approx(0.2 * sqrt(12 * 8), rel=0.16)
    shares = []
    for noise in (0.1, 0.3, 1.0):
        _, _, optimizer, moved = pair(noise)
        H = noises(optimizer)
        assert moved[0] == pytest.approx(full[0], rel=1e-12)
        shares.append(moved[1] / full[1])
        expected = ((NEEDED["alpha"] ** 2 + H["0.weight"]) / (NEEDED["alpha"] ** 2 + H["1.weight"])) ** 0.25
        assert shares[-1] == pytest.approx(expected, rel=0.15)
    assert 0.98 > shares[0] > shares[1] > shares[2]


def test_with_large_alpha_matrices_are_muons():
    params, others = parameters(), parameters()
    ours = make("lanton", params, OPTIONS | {"alpha": 1e12})
    like = {"nesterov": False, "orthogonalise": "polar-express", "scale": "match-rms"}
    muon = make("muon", others, {"lr": OPTIONS["lr"], "weight_decay": OPTIONS["weight_decay"]} | like)
    train(ours, params, 0, 20)
    train(muon, others, 0, 20)
    found, expected = values(params), values(others)
    for name, (_, role) in params.items():
        if role in ("matrix", "adapter"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


def test_sizes_of_the_first_update():
    """The root mean square is 0.2 for every kind, but for what the iteration leaves of it."""
    params = {
        "a.weight": (nn.Parameter(torch.zeros(12, 8)), "matrix"),
        "lm_head.weight": (nn.Parameter(torch.zeros(9, 4)), "head"),
        "norm.weight": (nn.Parameter(torch.zeros(7)), "vector"),
    }
    optimizer = create("lanton", params, lr=1.0, **NEEDED)
    for p, _ in params.values():
        p.grad = random(*p.shape).float()
    optimizer.step()
    for name, (p, _) in params.items():
        assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.16 if name == "a.weight" else 1e-6)
    assert torch.equal(params["lm_head.weight"][0].sign(), -params["lm_head.weight"][0].grad.sign())


def test_decay_follows_the_rate_of_the_layer():
    plain, decayed = pair(1.0, steps=2), pair(1.0, steps=2, weight_decay=0.1)
    share = sqrt((1 + noises(plain[2])["0.weight"] / 25) ** 0.5 / (1 + noises(plain[2])["1.weight"] / 25) ** 0.5)
    for i, rate in ((0, 1.0), (1, share)):
        first = pair(1.0, steps=1)[i].detach()
        torch.testing.assert_close(decayed[i].detach() - plain[i].detach(), -rate * 0.1 * first, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 12), (8, 24), (24, 8), (6, 4, 2)], ids=str)
@pytest.mark.parametrize(("steps", "error"), [(5, 0.16), (6, 0.01), (8, 1e-6)])
def test_nuclear_norm(shape: tuple[int, ...], steps: int, error: float):
    D = random(*shape)
    X = D.flatten(1)
    m, n = X.shape
    found = nuclear("polar-express", steps)(D).item() / sqrt(m / n)
    assert found == pytest.approx(torch.linalg.matrix_norm(X, "nuc").item(), rel=error)
    if steps > 5:
        assert X.norm().item() <= found <= sqrt(min(m, n)) * X.norm().item()


def test_each_norm_is_the_dual_of_the_steps():
    """The most that ⟨D, O⟩ can be over steps of unit size, which is what the step for B = D reaches."""
    D = random(9, 4)
    assert absolute_sum(D).item() == pytest.approx((D * D.sign()).sum().item())
    v = random(9)
    assert scaled_norm(v).item() == pytest.approx((v * v / v.square().mean().sqrt()).sum().item())
    U, _, V = torch.linalg.svd(D, full_matrices=False)
    step = sqrt(9 / 4) * U @ V
    x = random(4)
    assert (step @ x).square().mean().sqrt() <= x.square().mean().sqrt() * (1 + 1e-12)
    assert nuclear("polar-express", 10)(D).item() == pytest.approx((D * step).sum().item(), rel=1e-6)


def test_only_layers_with_a_gradient_are_compared():
    """A noisy layer alone has the full rate."""
    p, q, optimizer, _ = pair(1.0)
    before = q.detach().clone()
    p.grad, q.grad = None, random(12, 8)
    optimizer.step()
    assert (q.detach() - before).norm().item() == pytest.approx(0.2 * sqrt(12 * 8), rel=0.16)
