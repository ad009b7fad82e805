"""LoLDU's factors, value and gradients in float64."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fallline.adapters import attach
from fallline.adapters.layers import adapted
from fallline.adapters.loldu import SMALL, ldu
from fallline.errors import InputError

from .models import llama, logits


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(9, 9), (12, 7), (7, 12)])
def test_the_factors_are_the_first_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    W = drawn(*shape)
    P, L, U = torch.linalg.lu(W)
    assert not torch.equal(P, torch.eye(len(W), dtype=W.dtype)), "rows must really be swapped"
    for r in (1, 4, 7):
        lower, pivots, upper = ldu(W, r)
        torch.testing.assert_close(lower, (P @ L)[:, :r], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pivots, U.diagonal()[:r], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pivots[:, None] * upper, U[:r], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(upper.diagonal(), torch.ones(r, dtype=W.dtype))
    whole = min(shape)
    lower, pivots, upper = ldu(W, whole)
    torch.testing.assert_close(lower * pivots @ upper, W, rtol=1e-10, atol=1e-12)


def test_pivots_that_are_nearly_zero_are_made_larger_and_told(caplog: pytest.LogCaptureFixture) -> None:
    W = drawn(8, 6)
    W[:, 2] = 2 * W[:, 0] - W[:, 1]  # the third pivot is what rounding leaves
    W[:, 3] = 0
    with caplog.at_level(logging.WARNING, "fallline"):
        lower, pivots, upper = ldu(W, 6)
    assert [record.getMessage() for record in caplog.records] == [
        "adapter 'loldu': 2 of 6 pivots of a weight of 8 × 6 are nearly zero"
    ]
    torch.testing.assert_close(lower * pivots @ upper, W, rtol=1e-9, atol=1e-12)
    assert upper.abs().max() <= 1 / SMALL
    for broken in (torch.zeros(4, 5), torch.cat((torch.zeros(4, 3), torch.ones(4, 2)), 1)):
        lower, pivots, upper = ldu(broken, 3)
        assert all(t.isfinite().all() for t in (lower, pivots, upper))
        torch.testing.assert_close((lower * pivots @ upper)[:3], broken[:3])


def test_value_and_gradients_are_the_equations() -> None:
    torch.manual_seed(0)
    model = attach(torch.nn.Sequential(torch.nn.Linear(9, 7)).double(), "loldu", rank=4, scale=2.0)
    layer = adapted(model)["0"]
    P: Any = layer.adapters["default"]
    W = layer.matrix().detach()
    x, g = drawn(5, 9, seed=1), drawn(5, 7, seed=2)
    assert torch.equal(model(x), torch.nn.functional.linear(x, W, model[0].bias)), "bit for bit at the start"
    permute, L, U = torch.linalg.lu(W)
    lower, D = (permute @ L)[:, :4], U.diagonal()[:4]
    upper = U[:4] / D[:, None]
    P.z.data.copy_(drawn(4, seed=3))
    P.c.data.fill_(0.7)
    y = model(x)
    wanted = W - 2 * lower * D @ upper + 0.7 * lower * P.z.detach() @ upper
    torch.testing.assert_close(y, x @ wanted.t() + model[0].bias, rtol=1e-10, atol=1e-10)
    y.backward(g)
    inner = (lower.t() @ g.t() @ x @ upper.t()).diagonal()
    torch.testing.assert_close(P.z.grad, 0.7 * inner, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(P.c.grad, (inner * P.z.detach()).sum().view(1), rtol=1e-10, atol=1e-10)


def test_the_model_begins_bit_for_bit_as_it_was_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(logits(attach(llama(dtype), "loldu", rank=8, scale=0.3)), logits(llama(dtype)))


def test_a_rank_above_the_weights_is_refused() -> None:
    with pytest.raises(InputError, match=r"one of 32 × 32 has 32, got 'rank' = 33"):
        attach(llama(), "loldu", rank=33)


def test_the_change_of_a_model_that_is_cast_whole_is_float32() -> None:
    layer: Any = next(iter(adapted(attach(llama(), "loldu", rank=4).to(torch.bfloat16)).values()))
    P = layer.adapters["default"]
    assert P.lower.dtype == torch.bfloat16
    assert layer.methods["default"].delta(P, layer.matrix).dtype == torch.float32
