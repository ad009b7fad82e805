"""Bytes counted from shapes are bytes that real tensors take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fallline.footprint import Held, Shapes


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))


def heights(held: Held) -> tuple[int, int, int]:
    """Held by parameters, and the heights of a forward and of its backward."""
    held.height = held.now
    model = layers()
    weights = held.now
    loss = model(torch.ones(16, 32)).square().sum()
    forward, held.height = held.height, held.now
    loss.backward()
    return weights, forward, held.height


def test_shapes_hold_what_real_tensors_hold():
    with Held() as held:
        real = heights(held)
    with Shapes() as held:
        assert heights(held) == real
    assert real[0] == sum(4 * p.numel() for p in layers().parameters())


def test_a_storage_counts_once_and_while_something_refers_to_it():
    with Shapes() as held:
        x = torch.empty(1000)
        view = x[:10]
        assert held.now == 4000
        y = x + 1
        del x
        assert held.now == 8000
        del view, y
        assert held.now == 0
        assert held.height == 8000


def test_seventy_gigabytes_take_no_memory():
    with Shapes() as held:
        W = torch.empty(1 << 17, 1 << 17)
        assert (W @ W).shape == W.shape
        assert held.height == 2 * 4 * (1 << 34)


def test_code_that_asks_for_values_is_answered():
    with Shapes():
        t = torch.zeros(5)
        assert bool((t == 0).any())
        assert t.sum().item() == 1
        assert torch.equal(t, t + 1)
        assert t.nonzero().shape == (5, 1)


def test_what_was_there_before_is_told_by_its_values_again_afterwards():
    with Shapes():
        torch.empty(3)
    assert torch.arange(3).sum().item() == 3


def test_an_error_inside_ends_it():
    with pytest.raises(RuntimeError), Shapes():
        torch.empty(2, 3) @ torch.empty(2, 3)
    x: Tensor = torch.ones(2)
    assert x.sum().item() == 2
