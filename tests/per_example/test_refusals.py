"""What per-example gradients cannot be had of is named, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallline.errors import InputError
from fallline.per_example import Along, Norms, PerExample, Sketch, check

from .models import gpt2, llama, losses, made, packed_batch, rows_batch, trained


class Functional(nn.Module):
    """Uses its layer's weight past the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.one(x), self.two.weight)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "1 is a BatchNorm1d, whose weight is trained"),
        (nn.Sequential(nn.Bilinear(2, 2, 2)), "0 is a Bilinear"),
        (nn.Sequential(nn.Embedding(4, 2, sparse=True)), "0 is a Embedding with sparse"),
        (nn.Sequential(nn.Conv1d(2, 2, 2, padding_mode="circular")), "0 is a Conv1d with padding_mode"),
    ],
)
def test_an_unknown_layer_is_named_before_anything_runs(model: nn.Module, told: str) -> None:
    with pytest.raises(InputError, match=told):
        PerExample(model)


def test_a_frozen_layer_may_be_of_any_kind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval().requires_grad_(False))
    norms = Norms()
    with PerExample(model).watch(3, norms):
        model(torch.randn(3, 4)).sum().backward()
    assert [*norms.squared] == ["0.bias", "0.weight"] or [*norms.squared] == ["0.weight", "0.bias"]


def test_a_parameter_used_past_its_layer_is_noticed() -> None:
    model = Functional()
    with (
        pytest.raises(InputError, match=r"'two\.weight' is used outside its layer's forward"),
        PerExample(model).watch(3, Norms()),
    ):
        model(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model.one)
    model(torch.randn(3, 4)).sum().backward()  # an ordinary model again


def test_an_input_that_cannot_be_parted() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    told = r"0 gets an input of shape \[5, 4\], in which the 3 rows"
    with pytest.raises(InputError, match=told), PerExample(model).watch(3):
        model(torch.randn(5, 4))


def test_reentrant_checkpointing_is_refused() -> None:
    model, data = made(lambda: gpt2(0.0)), rows_batch()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="use_reentrant=False"), PerExample(model).watch(data, Norms()):
        losses(model, data).sum().backward()


def test_two_backwards_in_one_watch() -> None:
    model, data = made(llama), rows_batch()
    with PerExample(model).watch(data, Norms()):
        rows = losses(model, data)
        rows.sum().backward(retain_graph=True)
        with pytest.raises(InputError, match="one backward inside the watch"):
            rows.sum().backward()


def test_again_reads_another_term() -> None:
    model, data = made(llama), rows_batch()
    first, second, alone = Norms(), Norms(), Norms()
    engine = PerExample(model)
    with engine.watch(data, first) as seen:
        rows = losses(model, data)
        rows.sum().backward(retain_graph=True)
        seen.again(second)
        (3 * rows).sum().backward()
    grads = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    with engine.watch(data, alone):
        losses(model, data).sum().backward()
    assert torch.equal(first.total(), alone.total())
    assert torch.allclose(second.total(), 9 * first.total(), rtol=1e-5)  # its norms compute in float32
    assert all(torch.equal(grads[name], p.grad) for name, p in trained(model).items())


def test_watches_do_not_nest_and_add_once() -> None:
    model = nn.Linear(2, 1)
    engine = PerExample(model)
    with pytest.raises(InputError, match="watched already"), engine.watch(1), engine.watch(1):
        pass
    with engine.watch(1, keep=True) as seen:
        model(torch.ones(1, 2)).sum().backward()
    seen.add(torch.ones(1))
    with pytest.raises(InputError, match="add once"):
        seen.add(torch.ones(1))


def test_readers_check_their_input() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(InputError, match="'head'"), PerExample(model).watch(1, Along({"head": torch.ones(1)})):
        pass
    with pytest.raises(InputError, match="at least 1"):
        Sketch(0)


class SeesOthers(nn.Module):
    """Subtracts the mean over the batch: nothing that a rule of layers could see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return (y - y.mean(0)).square().sum(1)


class Positions(nn.Module):
    """Embeds the positions themselves: as many as rows here, and not rows at all."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.out = nn.Embedding(4, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.place(torch.arange(4))).square().sum((1, 2))


@pytest.mark.parametrize(("make", "x"), [(SeesOthers, torch.randn(3, 4)), (Positions, torch.randn(4, 4, 3))])
def test_the_check_finds_examples_that_are_not_apart(make: Any, x: Tensor) -> None:
    model = make()
    with pytest.raises(InputError, match=r"not those of one example: the norm of '(inner|place)"):
        check(PerExample(model), len(x), lambda: model(x))


@pytest.mark.parametrize("batch", [rows_batch, packed_batch])
def test_the_check_leaves_all_as_it_was(batch: Any) -> None:
    model, data = made(llama, torch.float32), batch()
    losses(model, data).sum().backward()
    before = {name: p.grad for name, p in trained(model).items()}
    copies = {name: g.clone() for name, g in before.items()}
    check(PerExample(model), data, lambda: losses(model, data), at=1)
    assert all(p.grad is before[name] and torch.equal(p.grad, copies[name]) for name, p in trained(model).items())
