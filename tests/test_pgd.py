"""Projected gradient ascent: the ball, the maximum on a linear map, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fallline.pgd import Adam, added, ascend, ball, frozen, unit


def test_the_ball_is_left_alone_inside_and_met_at_its_edge() -> None:
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(ball(delta, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert ball(delta, 0.0).tolist() == [[0, 0]] * 3
    torch.testing.assert_close(unit(delta)[:2], torch.tensor([[0.6, 0.8]] * 2))
    assert unit(delta)[2].tolist() == [0, 0]


def test_on_a_linear_map_it_grows_at_every_step_to_the_largest_singular_value() -> None:
    g = torch.Generator().manual_seed(0)
    A, start = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((7, 5), (3, 5)))

    def value(delta: torch.Tensor) -> torch.Tensor:
        return (delta @ A.t()).square().sum()

    seen = [value(ascend(value, ball(start, 0.2), steps=n, size=0.02, radius=0.2)).item() for n in range(12)]
    assert seen == sorted(seen)
    delta = ascend(value, ball(start, 0.2), steps=300, size=0.1, radius=0.2)
    each = (delta @ A.t()).norm(dim=1)
    torch.testing.assert_close(each, 0.2 * torch.linalg.svdvals(A)[0].expand(3), rtol=1e-6, atol=0)
    assert not delta.requires_grad


def test_adam_is_torch_s_and_leaves_what_has_no_gradient() -> None:
    c = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c[1, 2:] = 0

    def value(delta: torch.Tensor) -> torch.Tensor:
        return (c * delta).sin().sum()

    wanted = torch.zeros_like(c, requires_grad=True)
    adam = torch.optim.Adam([wanted], lr=0.1, maximize=True)
    for _ in range(7):
        adam.zero_grad()
        value(wanted).backward()
        adam.step()
    found = ascend(value, torch.zeros_like(c), steps=7, size=0.1, radius=9.0, rule=Adam())
    torch.testing.assert_close(found, wanted.detach())
    assert not found[1, 2:].any()


def test_of_a_tuple_the_first_output_is_changed() -> None:
    layer = nn.LSTM(2, 3)
    x = torch.ones(4, 2)
    out, state = layer(x)
    with added(layer, torch.ones(4, 3)):
        moved, same = layer(x)
    torch.testing.assert_close(moved, out + 1)
    assert torch.equal(same[0], state[0])


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_module_within_a_compiled_one_is_changed_too() -> None:
    model, x = Stack(), torch.ones(4, 2)
    plain, wanted = model(x), torch.tanh(model.layers[0](x) + 1)
    model.compile(backend="eager")
    torch.testing.assert_close(model(x), plain)
    with added(model.layers[0], torch.ones(4, 2)):
        torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(model(x), plain)


def test_parameters_and_outputs_are_as_they_were() -> None:
    layer = nn.Embedding(4, 3)
    layer.weight.grad = torch.ones(4, 3)
    other = nn.Parameter(torch.ones(1), requires_grad=False)
    ids, before = torch.tensor([1, 2]), layer.weight.detach().clone()
    plain = layer(ids).detach()
    with frozen([layer.weight, other]), added(layer, torch.ones(2, 3)):
        assert not layer.weight.requires_grad
        torch.testing.assert_close(layer(ids), plain + 1)
    with pytest.raises(IndexError), frozen([layer.weight]), added(layer, torch.ones(2, 3)):
        layer(ids + 9)
    assert layer.weight.requires_grad
    assert not other.requires_grad
    assert torch.equal(layer(ids), plain)
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is not None
    assert bool((layer.weight.grad == 1).all())
