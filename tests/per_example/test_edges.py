"""Where a quick implementation would be silently wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fallline.adapters import attach
from fallline.cross_entropy import _sweep, _Watched, full_cross_entropy
from fallline.errors import InputError
from fallline.per_example import Along, Norms, PerExample, Sketch, Spans, check, linear, pieces
from fallline.per_example.forms import Grams, Outer, Pair
from fallline.per_example.head import HeadGradients

from .models import llama, losses, made, packed_batch, rows_batch, trained, truth


def test_a_norm_that_cancels_is_bounded_from_above() -> None:
    """Equal inputs, output gradients that sum to zero: the true gradient is nothing but rounding."""
    noise = torch.Generator().manual_seed(0)
    T, d = 8, 32
    A = torch.randn(1, d, generator=noise).expand(T, d).contiguous()
    G = 1e6 * torch.randn(T, d, generator=noise)
    G -= G.mean(0)
    form = Outer((Pair(A, G, Spans(((0, T),), T, T, A.device)),), Grams())
    told = form.squared(bound=True).sqrt()
    assert form.squared().sqrt() < told
    assert form.total(1 / told).norm() <= 1  # what is clipped by it does not pass the limit
    ordinary = Outer((Pair(torch.randn(T, d), torch.randn(T, d), Spans(((0, T),), T, T, A.device)),), Grams())
    assert torch.allclose(ordinary.squared(bound=True), ordinary.squared(), rtol=1e-4)


@pytest.mark.parametrize("size", [3, 8, 100])
@pytest.mark.parametrize("ends", [((0, 6), (10, 40)), ((4, 5), (5, 5), (9, 30)), ((0, 20), (20, 38))])
def test_the_head_with_tokens_of_nobodys(ends: Any, size: int) -> None:
    """On a GPU tokens without label are not left out; they lie between examples."""
    noise = torch.Generator().manual_seed(0)
    N, D, V = 40, 6, 9
    hidden = torch.randn(N, D, generator=noise, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(D, V, bias=True).double()
    labels = torch.randint(0, V, (N,), generator=noise)
    spans = Spans(ends, None, N, hidden.device)
    nobodys = spans.owner == len(ends)
    labels[nobodys] = -100
    share = torch.rand(N, generator=noise, dtype=torch.float64)
    for keep in (False, True):
        head.zero_grad()
        norms = Norms()
        with PerExample(head).watch(len(ends), norms, keep=keep) as seen:
            seen.scratch.take((1000,), torch.float64).fill_(7)  # what an earlier layer left there
            found = HeadGradients.of(head.weight, head.bias)
            chunks = pieces(spans, size)
            assert [i for p in chunks for i in range(p.tokens.start, p.tokens.stop)] == list(range(N))
            values = _Watched.apply(hidden, head.weight, head.bias, labels, share, chunks, spans, found, None)
            (values * share).sum().backward()
        if keep:
            seen.add(torch.ones(len(ends), dtype=torch.float64))
        own = full_cross_entropy(head(hidden), labels) * share
        for b in range(len(ends)):
            each = torch.autograd.grad(own[spans.owner == b].sum(), [head.weight, head.bias], retain_graph=True)
            whole = sum(g.square().sum() for g in each)
            assert norms.total()[b].item() == pytest.approx(float(whole), rel=1e-10, abs=1e-20)
        wanted = torch.autograd.grad(own.sum(), [head.weight, head.bias])
        assert torch.allclose(head.weight.grad, wanted[0], atol=1e-12)
        assert torch.allclose(head.bias.grad, wanted[1], atol=1e-12)
    with torch.no_grad():
        assert torch.equal(_sweep(hidden, head.weight, head.bias, labels, chunks)[0] == 0, nobodys)


class Selects(nn.Module):
    """Sends some tokens of all rows through a layer, as a mixture of experts does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()]).square().sum()


@pytest.mark.parametrize("adapter", [False, True])
def test_tokens_taken_out_of_their_rows_are_refused(adapter: bool) -> None:
    model = Selects(nn.Linear(4, 4))
    if adapter:
        attach(model, "lora", rank=2)
    batch = {"example_id": torch.arange(2), "input_ids": torch.zeros(2, 3, dtype=torch.long)}
    with pytest.raises(InputError, match="rows cannot be told apart"), PerExample(model).watch(batch):
        model(torch.randn(2, 3, 4))


def test_positions_as_many_as_words_in_a_row() -> None:
    place = nn.Embedding(4, 3)
    batch = {"example_id": torch.arange(4), "input_ids": torch.zeros(4, 4, dtype=torch.long)}
    with pytest.raises(InputError, match="give them for each row"), PerExample(place).watch(batch):
        place(torch.arange(4))


def test_a_weight_that_is_computed_or_thawed_is_no_silent_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False))
    engine = PerExample(model)
    model[1].requires_grad_(True)
    run(engine, model)
    assert model[1].weight.grad is not None  # an ordinary one
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(InputError):
        run(PerExample(normed), normed)
    with pytest.raises(InputError, match="computed from others"), PerExample(model[0]).watch(3):
        linear(torch.randn(3, 4), model[0].weight * 2)
    model[0].requires_grad_(False)
    with pytest.raises(InputError, match="was frozen since"):
        run(engine, model)
    assert run(PerExample(model), model) is None  # nothing is left behind


def run(engine: PerExample, model: nn.Module) -> None:
    with engine.watch(3, Norms()):
        model(torch.randn(3, 4)).sum().backward()


def test_batch_normalisation_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    with pytest.raises(InputError, match="batch normalisation"):
        run(PerExample(model), model)
    run(PerExample(model), model.eval())


@pytest.mark.parametrize("batch", [rows_batch, packed_batch])
def test_everything_under_autocast(batch: Any) -> None:
    """The head's factors are bfloat16, the embedding's float32, and they are one weight."""
    model, data = made(llama, torch.float32), batch()
    whole = torch.cat([each.flatten(1) for each in truth(trained(model), losses(model, data)).values()], 1)
    number = len(whole)
    norms, sketch, kept = Norms(), Sketch(4), Norms(bound=True)

    def rows() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(model, data)

    with PerExample(model).watch(data, norms, sketch):
        rows().sum().backward()
    model.zero_grad()
    with PerExample(model).watch(data, kept, keep=True) as seen:
        rows().sum().backward()
    for found in (norms, kept):
        assert ((found.total().sqrt() - whole.norm(dim=1)).abs() < 0.05 * whole.norm(dim=1).max()).all()
    seen.add(torch.eye(number)[1])
    one = torch.cat([p.grad.flatten() for p in trained(model).values()])
    assert (one - whole[1]).norm() < 0.05 * whole.norm(dim=1).max()


def test_sums_of_float32_adapters_on_a_bfloat16_base_are_float32() -> None:
    model, data = made(llama, torch.bfloat16), rows_batch()
    attach(model, "lora", rank=2)
    for p in trained(model).values():
        nn.init.normal_(p, std=0.1)
    norms = Norms(bound=True)
    with PerExample(model).watch(data, norms, keep=True) as seen:
        losses(model, data).sum().backward()
    seen.add(1 / norms.total().sqrt().clamp(min=1e-6) * torch.eye(5)[0])
    assert torch.cat([p.grad.flatten() for p in trained(model).values()]).norm().item() == pytest.approx(1, rel=1e-4)


def test_nothing_is_drawn() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 2))
    norms = Norms()
    with PerExample(model).watch(0, norms):
        model(torch.zeros(0, 2, 4)).sum().backward()
    assert norms.total().shape == (0,)
    data = rows_batch()
    data["labels"][:] = -100
    words, norms = made(llama), Norms()
    with PerExample(words).watch(data, norms, Sketch(2)):
        losses(words, data).sum().backward()
    assert torch.equal(norms.total(), torch.zeros(5, dtype=torch.float64))


def test_a_copy_made_inside_a_watch_is_an_ordinary_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with PerExample(model).watch(3, Norms()):
        twin = copy.deepcopy(model)
        model(torch.randn(3, 4)).sum().backward()
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), model(x))


def test_inputs_by_name() -> None:
    layer, norms = nn.Linear(4, 4), Norms()
    with PerExample(layer).watch(3, norms):
        layer(input=torch.ones(3, 4)).sum().backward()
    assert torch.equal(norms.squared["weight"], torch.full((3,), 16.0))


def test_a_head_used_twice_is_named() -> None:
    model, data = made(llama), rows_batch()
    with pytest.raises(InputError, match=r"embed_tokens.weight': a head that is used twice"):  # noqa: SIM117
        with PerExample(model).watch(data, Norms()):
            (losses(model, data) + losses(model, data)).sum().backward()


def test_wrong_directions_and_losses_without_a_gradient() -> None:
    layer = nn.Linear(4, 4)
    engine = PerExample(layer)
    with pytest.raises(InputError, match="which has 16 numbers"), engine.watch(1, Along({"weight": torch.ones(3)})):
        pass
    check(engine, 2, lambda: torch.zeros(2))
    check(engine, 2, lambda: layer(torch.full((2, 4), torch.nan)).sum(1))  # the training step says it better
