"""Gradients of weights before training, a few at a time; leading singular triples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fallline.calibrate import Data, evaluating, gradients, grouped, low_rank
from fallline.errors import InputError


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(model: Any, scale: float = 1.0) -> Data:
    rows = torch.randn(4, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Data(lambda: iter({"x": x} for x in rows), lambda batch: scale * model(batch["x"]).square().sum())


@pytest.mark.parametrize("room", [0, 8 * 32, 10**6])
def test_gradients_are_those_of_the_sum_however_many_at_a_time(room: int) -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    model[2].weight.grad = kept = torch.ones_like(model[2].weight)
    before = [p.requires_grad for p in model.parameters()]
    weights = {f"{i}.weight": model[i].weight for i in (0, 2, 4)}
    found = dict(gradients(model, weights, data(model), room))
    assert list(found) == (["4.weight", "2.weight", "0.weight"] if room == 0 else list(found))
    assert [p.requires_grad for p in model.parameters()] == before
    assert model[2].weight.grad is kept
    assert all(p.grad is None for n, p in model.named_parameters() if n != "2.weight")
    whole = data(model)
    loss = torch.stack([whole.loss(batch) for batch in whole.batches()]).sum()
    true = torch.autograd.grad(loss, list(weights.values()))
    for (name, p), g in zip(weights.items(), true, strict=True):
        assert found[name].shape == p.shape
        torch.testing.assert_close(found[name], g, rtol=1e-12, atol=1e-12)


def test_groups_fit_into_the_room_or_hold_one() -> None:
    weights = {str(n): nn.Parameter(torch.zeros(n)) for n in (3, 4, 20, 2, 2)}
    assert [list(group) for group in grouped(weights, 28)] == [["3", "4"], ["20"], ["2"]]
    assert sum(len(group) for group in grouped(weights, 0)) == len(weights)


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    model = nn.Module()
    model.p = p
    parts = Data(lambda: iter({"c": c} for c in (256.0, 1.0, 1.0)), lambda batch: (p * batch["c"]).sum())
    ((_, G),) = gradients(model, {"p": p}, parts, 0)
    assert G.dtype == torch.float32
    assert G.item() == 258


def test_no_data_and_losses_that_are_not_finite_are_refused() -> None:
    model = net()
    weights = {"0.weight": model[0].weight}
    with pytest.raises(InputError, match="no data"):
        list(gradients(model, weights, Data(lambda: iter(()), lambda batch: torch.zeros(())), 0))
    with pytest.raises(InputError, match="the loss on the data to begin from is inf"):
        list(gradients(model, weights, data(model, float("inf")), 0))
    assert all(p.requires_grad for p in model.parameters())


def test_evaluation_mode_ends_where_it_began() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (12, 30)])
def test_leading_triples_are_those_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    noise = torch.Generator().manual_seed(0)
    G = torch.randn(*shape, generator=noise, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    decaying = (U * S.mul(0.5 ** torch.arange(len(S)))) @ Vh
    u, s, v = low_rank(decaying, 5, torch.Generator().manual_seed(1))
    assert u.shape == (shape[0], 5)
    assert v.shape == (shape[1], 5)
    wanted = torch.linalg.svdvals(decaying)[:5]
    torch.testing.assert_close(s, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close((u * s) @ v.t(), (U[:, :5] * wanted) @ Vh[:5], rtol=1e-8, atol=1e-8 * float(wanted[0]))
    u, s, _ = low_rank(G, 5, torch.Generator().manual_seed(1))  # a flat spectrum
    assert (s / torch.linalg.svdvals(G)[:5] - 1).abs().max() < 0.05
    torch.testing.assert_close(u.t() @ u, torch.eye(5, dtype=torch.float64))
