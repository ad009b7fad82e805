"""What is special to diffGrad: how friction depends on the change of the gradient, and its peer."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fallline.kernels.elementwise import SOURCE
from fallline.kernels.native import compiled
from fallline.optim import create

from .parameters import gradient

NAME = "layers.0.up.weight"

plain_too = pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])


def steps(gradients: list[Tensor], id: str = "diffgrad", *, plain: bool = False, **options: Any) -> list[Tensor]:
    """The update of each step at learning rate one, without weight decay."""
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = create(id, [("a.weight", p)], lr=1.0, **options)
    optimizer.plain = plain
    found = []
    for g in gradients:
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
        found.append(before - p.detach())
    return found


def adam(gradients: list[Tensor]) -> list[Tensor]:
    """Adam's, with ε beside the uncorrected root."""
    return steps(gradients, "spam", threshold=0.0, reset_every=0, eps=1e-8)


def friction(gradients: list[Tensor], **options: Any) -> list[Tensor]:
    """ξ, by which the steps are smaller than Adam's."""
    return [a / b for a, b in zip(steps(gradients, **options), adam(gradients), strict=True)]


def some(steps: int = 12, scale: float = 1.0) -> list[Tensor]:
    return [scale * (0.1 + gradient(step, "norm.weight", (40,)).abs()) for step in range(steps)]


@plain_too
def test_a_constant_gradient_gets_half_of_adams_step(plain: bool):
    g = some()[0]
    first, *others = friction([g] * 6, plain=plain)
    torch.testing.assert_close(first, torch.sigmoid(g))
    for xi in others:
        torch.testing.assert_close(xi, torch.full_like(g, 0.5))


@plain_too
def test_a_gradient_that_changes_much_gets_adams_step(plain: bool):
    gradients = [100.0 * (step % 2 + 1) * torch.ones(3).double() for step in range(6)]
    for xi in friction(gradients, plain=plain):
        torch.testing.assert_close(xi, torch.ones_like(xi))


@plain_too
def test_friction_is_between_a_half_and_one_and_takes_many_values(plain: bool):
    for options in ({}, {"change": "relative"}):
        found = torch.cat(friction(some(), plain=plain, **options))
        assert found.min() >= 0.5 - 1e-12
        assert found.max() <= 1.0
        assert found.min() < 0.52
        assert found.max() > 0.7


@plain_too
def test_of_small_gradients_only_the_relative_change_counts(plain: bool):
    found = {change: torch.cat(friction(some(scale=1e-4), plain=plain, change=change, eps=1e-8)) for change in CHANGES}
    assert found["absolute"].max() < 0.501
    assert found["relative"].max() > 0.7
    big, small = (torch.stack(steps(some(scale=s), plain=plain, change="relative", eps=1e-30)) for s in (1.0, 1e-4))
    torch.testing.assert_close(big, small, rtol=1e-9, atol=0)


CHANGES = ("absolute", "relative")


def test_it_stops_at_a_minimum_that_adam_runs_past():
    """On f(x) = x² from −1 the step shrinks with the change of the gradient, so that less is overshot."""
    found = {}
    for id in ("diffgrad", "spam"):
        p = nn.Parameter(torch.tensor([-1.0], dtype=torch.float64))
        optimizer = create(id, [("a", p)], lr=0.1, **({} if id == "diffgrad" else {"reset_every": 0}))
        path = []
        for _ in range(300):
            p.grad = 2 * p.detach()
            optimizer.step()
            path.append(p.item())
        found[id] = np.array(path)
    assert 0 < found["diffgrad"].max() < found["spam"].max()
    assert abs(found["diffgrad"][-1]) < 1e-3


@pytest.mark.peer
def test_agrees_with_pytorch_optimizer():
    """Fifty steps, decay included; it adds 1e-15 to V. Before its fourth version it computed ξ and did not use it."""
    peer = import_module("pytorch_optimizer")
    p, q = (nn.Parameter(gradient(99, NAME, (7, 3))) for _ in range(2))
    a = create("diffgrad", [("a.weight", p)], lr=1e-2, weight_decay=0.1)
    b = peer.DiffGrad([q], lr=1e-2, weight_decay=0.1)
    for step in range(50):
        p.grad = gradient(step, NAME, (7, 3))
        q.grad = p.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=0, atol=5e-7)


@pytest.mark.parametrize("size", [None, 1 << 20, 4, 40], ids=str)
@pytest.mark.parametrize("relative", [False, True])
def test_parts_together_are_the_whole(size: int | None, relative: bool, monkeypatch: pytest.MonkeyPatch):
    """In C, and in slices without; of a parameter that is whole, turned or with gaps in memory."""
    if size is None:
        if compiled(SOURCE) is None:
            pytest.skip("no C compiler")
        monkeypatch.setattr("fallline.kernels.elementwise.SHARE", 4)
    else:
        monkeypatch.setattr("fallline.kernels.elementwise.compiled", lambda source: None)
        monkeypatch.setattr("fallline.kernels.friction_adam.SLICE", size)
    found = []
    for layout in ("plain", "whole", "turned", "gaps"):
        start = gradient(99, NAME, (7, 3)).float()
        data = {"turned": start.t().contiguous().t(), "gaps": torch.zeros(7, 6)[:, ::2].copy_(start)}
        p = nn.Parameter(data.get(layout, start))
        optimizer = create(
            "diffgrad", [("a.weight", p)], lr=0.1, weight_decay=0.1, change="relative" if relative else "absolute"
        )
        optimizer.plain = layout == "plain"
        for step in range(6):
            p.grad = gradient(step, NAME, (7, 3)).float()
            optimizer.step()
        found.append(p.detach().contiguous())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


@plain_too
def test_changes_of_all_sizes_have_their_sigmoid(plain: bool):
    """The exponential is the loop's own, where that is C."""
    g = torch.logspace(-10, 10, 4001) * torch.tensor([1.0, -1.0]).repeat(2001)[:4001]
    torch.testing.assert_close(steps([g], plain=plain, eps=1e-30)[0], g.sign() * g.abs().sigmoid(), rtol=2e-6, atol=0)


@plain_too
def test_nan_is_shown_where_it_is(plain: bool):
    g = torch.ones(2, 3)
    g[0, 1] = float("nan")
    step = steps([g], plain=plain)[0]
    assert torch.equal(step.isnan(), g.isnan())
