"""Per-example gradients against one ordinary backward for each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fallline.adapters import attach
from fallline.per_example import Along, Dots, Norms, PerExample, Sketch

from .models import LANGUAGE, gpt2, llama, losses, made, packed_batch, rows_batch, trained, truth

EXACT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02}
"""Relative to the largest norm of the batch. bfloat16: products are rounded to 8 bits, sums are not."""


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    scale = wanted.abs().max().clamp(min=1e-30)
    assert found.shape == wanted.shape
    assert ((found - wanted).abs().max() / scale).item() < tolerance


def watched(model: Any, rows: Callable[[], Tensor], batch: Any, *readers: Any, **how: Any) -> Any:
    model.zero_grad()
    with PerExample(model).watch(batch, *readers, **how) as seen:
        rows().sum().backward()
    return seen


def verify(model: Any, rows: Callable[[], Tensor], batch: Any, tolerance: float = 1e-10) -> None:
    """Norms, sums, weighted sums, and every reader."""
    params = trained(model)
    true = truth(params, rows())
    number = len(next(iter(true.values())))
    flat = {name: each.flatten(1) for name, each in true.items()}
    whole = torch.cat(list(flat.values()), 1)
    noise = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(p.shape, generator=noise, dtype=p.dtype) for name, p in params.items()}
    weight = torch.rand(number, generator=noise, dtype=whole.dtype)

    def sums(weighted: dict[str, Tensor]) -> None:
        for name, p in params.items():
            wanted = (weighted[name].view(-1, *[1] * p.dim()) * true[name]).sum(0)
            got = torch.zeros_like(p) if p.grad is None else p.grad
            assert (got - wanted).abs().max() <= tolerance * whole.norm(dim=1).max(), name

    one = dict.fromkeys(params, torch.ones(number, dtype=whole.dtype))
    norms = Norms()
    watched(model, rows, batch, norms)
    near(norms.total().sqrt(), whole.norm(dim=1), tolerance)
    for name, each in flat.items():
        got = norms.squared.get(name, torch.zeros(number, dtype=whole.dtype))
        assert (got.sqrt() - each.norm(dim=1)).abs().max() <= tolerance * whole.norm(dim=1).max(), name
    sums(one)

    norms, dots, along, sketch = Norms(), Dots(), Along(direction), Sketch(6)
    watched(model, rows, batch, norms, dots, along, sketch)
    near(norms.total().sqrt(), whole.norm(dim=1), tolerance)
    near(dots.total, whole @ whole.t(), tolerance)
    near(along.total, whole @ torch.cat([v.flatten() for v in direction.values()]), tolerance)
    sums(one)

    kept, again = Norms(), Sketch(6)
    seen = watched(model, rows, batch, kept, again, keep=True)
    assert all(p.grad is None for p in params.values())
    near(kept.total().sqrt(), whole.norm(dim=1), tolerance)
    near(again.total, sketch.total, tolerance)
    seen.add(weight)
    sums(dict.fromkeys(params, weight))

    told: dict[str, Tensor] = {}
    watched(model, rows, batch, weigh=lambda name, squared: told.setdefault(name, 1 / (1 + squared)))
    sums({name: 1 / (1 + each.square().sum(1)) for name, each in flat.items()})


@pytest.mark.parametrize("batch", [rows_batch, packed_batch], ids=["padded rows", "packed"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name: str, batch: Callable[[], dict[str, Tensor]]) -> None:
    model, data = made(LANGUAGE[name]), batch()
    within = 1e-6 if name == "gemma" else 1e-10  # its norms compute in float32 whatever the model's dtype
    verify(model, lambda: losses(model, data), data, within)


@pytest.mark.parametrize("size", [3, 5, 12, 1000])
@pytest.mark.parametrize("batch", [rows_batch, packed_batch], ids=["padded rows", "packed"])
def test_examples_longer_and_shorter_than_a_chunk(
    batch: Callable[[], dict[str, Tensor]], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fallline.cross_entropy.chunk_size", lambda *_: size)
    model, data = made(llama), batch()
    for early in (True, False):
        verify(model, lambda early=early: losses(model, data, early), data)


def test_gram_and_product_forms_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = made(llama), rows_batch()
    for share in (0.0, 1e9):
        monkeypatch.setattr("fallline.per_example.forms.GRAM_BELOW", share)
        verify(model, lambda: losses(model, data), data)
    monkeypatch.setattr("fallline.per_example.forms.BLOCK_BYTES", 1000)
    verify(model, lambda: losses(model, data), data)


def test_activation_checkpointing() -> None:
    model, data = made(lambda: gpt2(0.1)), rows_batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    verify(model, lambda: losses(model, data), data)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("batch", [rows_batch, packed_batch], ids=["padded rows", "packed"])
def test_lora(batch: Callable[[], dict[str, Tensor]], dropout: float) -> None:
    for make in (llama, gpt2):
        model, data = made(lambda make=make: attach(make(), "lora", rank=3, dropout=dropout)), batch()
        verify(model, lambda model=model, data=data: losses(model, data), data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model, data = made(llama, dtype), rows_batch()
    true = made(llama, torch.float64)
    true.load_state_dict(model.state_dict())
    norms = Norms()
    watched(model, lambda: losses(model, data), data, norms)
    whole = torch.cat([each.flatten(1) for each in truth(trained(true), losses(true, data)).values()], 1)
    near(norms.total().double().sqrt(), whole.norm(dim=1), EXACT[dtype])


def test_autocast() -> None:
    model, data = made(llama, torch.float32), rows_batch()
    norms = Norms()

    def rows() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(model, data)

    watched(model, rows, data, norms)
    whole = torch.cat([each.flatten(1) for each in truth(trained(model), losses(model, data)).values()], 1)
    near(norms.total().sqrt(), whole.norm(dim=1), 0.05)
    assert model.lm_head.weight.grad.dtype == torch.float32


class Twice(nn.Module):
    """One linear layer used twice, a norm, one that is used once in two forwards' worth of tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm, self.rms = nn.Linear(6, 6), nn.LayerNorm(6), nn.RMSNorm(6)
        self.unused, self.last = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.shared(x)))
        return self.last(self.rms(torch.tanh(self.shared(x[:, ::2]))))


def test_shared_and_unused_layers() -> None:
    model = made(Twice)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    verify(model, lambda: model(x).square().sum((1, 2)), 4)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2)
        self.two = nn.Conv1d(6, 4, 2, dilation=2, bias=False)
        self.three = nn.Conv3d(1, 2, (2, 1, 2), padding=(1, 0, 0))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.two(torch.tanh(self.one(x)).flatten(2)))
        return self.last(self.three(x[:, None, :, None, :]).mean((3, 4)).flatten(1)[:, :8])


def test_convolutions() -> None:
    model = made(Convolutions)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    verify(model, lambda: model(x).square().sum(1), 4)


def test_sketches_have_the_inner_products_in_the_mean() -> None:
    model, data = made(llama), rows_batch()
    dots = Dots()
    watched(model, lambda: losses(model, data), data, dots)
    found = []
    for seed in range(60):
        sketch = Sketch(16, seed)
        watched(model, lambda: losses(model, data), data, sketch)
        found.append(sketch.total @ sketch.total.t())
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 60**0.5
    assert ((mean - dots.total).abs() < 5 * error + 1e-9).all()


def test_accumulation_adds_up() -> None:
    model, data = made(llama), rows_batch()
    losses(model, data).sum().backward()
    wanted = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    engine, found = PerExample(model), []
    for part in (slice(0, 2), slice(2, 5)):
        some, norms = {k: v[part] for k, v in data.items()}, Norms()
        with engine.watch(some, norms):
            losses(model, some).sum().backward()
        found.append(norms.total())
    whole = torch.cat([each.flatten(1) for each in truth(trained(model), losses(model, data)).values()], 1)
    near(torch.cat(found).sqrt(), whole.norm(dim=1))
    for name, p in trained(model).items():
        near(p.grad, wanted[name])
