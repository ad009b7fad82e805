"""What is special to Lion: every element moves by the rate, as in the released code and its peer, to the bit."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn

from fallline.kernels.elementwise import SOURCE
from fallline.kernels.native import compiled
from fallline.optim import create

from .parameters import gradient

NAME = "layers.0.up.weight"


def test_every_element_moves_by_the_rate():
    p = nn.Parameter(torch.zeros(7, 3, dtype=torch.float64))
    optimizer = create("lion", [("a.weight", p)], lr=0.5)
    for step in range(10):
        before = p.detach().clone()
        p.grad = gradient(step, NAME, (7, 3)) + 1e-9
        optimizer.step()
        assert ((before - p.detach()).abs() == 0.5).all()


def test_the_update_looks_ahead_of_the_average():
    """β₁ M + (1 − β₁) G turns where M has not yet."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = create("lion", [("a", p)], lr=1.0)
    path = []
    for g in (1.0, -1.0, 0.0):
        p.grad = torch.tensor([g])
        optimizer.step()
        path.append(p.item())
    assert path == [-1.0, 0.0, 1.0]  # the second by G alone; M, 0.0099 − 0.01, then has its sign


@pytest.mark.peer
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_pytorch_optimizer(decay: float, dtype: torch.dtype):
    peer = import_module("pytorch_optimizer")
    p, q = (nn.Parameter(gradient(99, NAME, (7, 3), dtype)) for _ in range(2))
    a = create("lion", [("a.weight", p)], lr=1e-2, weight_decay=decay)
    b = peer.Lion([q], lr=1e-2, weight_decay=decay)
    for step in range(50):
        p.grad = gradient(step, NAME, (7, 3), dtype)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("size", [None, 1 << 20, 4, 40], ids=str)
def test_parts_together_are_the_whole(size: int | None, monkeypatch: pytest.MonkeyPatch):
    """In C, and in slices without; of a parameter that is whole, turned or with gaps in memory."""
    if size is None:
        if compiled(SOURCE) is None:
            pytest.skip("no C compiler")
        monkeypatch.setattr("fallline.kernels.elementwise.SHARE", 4)
    else:
        monkeypatch.setattr("fallline.kernels.elementwise.compiled", lambda source: None)
        monkeypatch.setattr("fallline.kernels.lion.SLICE", size)
    found = []
    for layout in ("plain", "whole", "turned", "gaps"):
        start = gradient(99, NAME, (7, 3)).float()
        data = {"turned": start.t().contiguous().t(), "gaps": torch.zeros(7, 6)[:, ::2].copy_(start)}
        p = nn.Parameter(data.get(layout, start))
        optimizer = create("lion", [("a.weight", p)], lr=0.1, weight_decay=0.1)
        optimizer.plain = layout == "plain"
        for step in range(6):
            g = gradient(step, NAME, (7, 3)).float()
            p.grad = g.clone()
            optimizer.step()
            assert torch.equal(p.grad, g)
        found.append(p.detach().contiguous())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
def test_nan_stops_its_element_and_no_other(plain: bool):
    """As with all that take torch's sign, which of NaN is zero; the state shows it."""
    p = nn.Parameter(torch.ones(2, 3))
    optimizer = create("lion", [("a.weight", p)], lr=0.5)
    optimizer.plain = plain
    for value in (float("nan"), 1.0):
        p.grad = torch.ones(2, 3)
        p.grad[0, 1] = value
        optimizer.step()
    assert p.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert optimizer.state[p]["lionema"]["average"].isnan().nonzero().tolist() == [[0, 1]]
