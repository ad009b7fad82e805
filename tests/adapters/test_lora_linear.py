"""The fused linear layer against the one written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fallline.kernels.lora_linear import lora_linear, lora_linear_plain


def inputs(
    dtype: torch.dtype = torch.float64, bias: bool = True, transposed: bool = False, lead: tuple[int, ...] = (2, 5)
) -> list[Any]:
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)

    x = draw(*lead, 7).requires_grad_()
    W = draw(7, 6).t() if transposed else draw(6, 7)
    return [x, W, draw(6) if bias else None, draw(3, 7).requires_grad_(), draw(6, 3).requires_grad_(), 1.7]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("lead", [(5,), (2, 5), (0,), ()])
def test_values_and_gradients_are_those_of_the_plain_form(bias: bool, transposed: bool, lead: tuple[int, ...]) -> None:
    given = inputs(bias=bias, transposed=transposed, lead=lead)
    upstream = torch.randn((*lead, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fused, plain = lora_linear(*given), lora_linear_plain(*given)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    wanted = [given[0], given[3], given[4]]
    for a, b in zip(
        torch.autograd.grad(fused, wanted, upstream), torch.autograd.grad(plain, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_derivatives_are_right_to_second_order() -> None:
    x, W, b, A, B, s = inputs(lead=(3,))
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, W, b, A, B, s), (x, A, B))
    assert torch.autograd.gradgradcheck(lambda x, A, B: lora_linear(x, W, b, A, B, s), (x, A, B))


@pytest.mark.parametrize("frozen", [(0,), (3,), (4,), (3, 4)])
def test_only_what_a_gradient_needs_is_kept(frozen: tuple[int, ...]) -> None:
    given = inputs()
    for i in frozen:
        given[i].requires_grad_(False)
    kept: list[tuple[int, ...]] = []
    with saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        out = lora_linear(*given)
    assert ((10, 7) in kept) == (frozen != (3, 4)), "x is kept for A's and B's gradients"
    assert ((6, 7) in kept) == (0 not in frozen), "W is kept for x's gradient"
    assert ((10, 3) in kept) == (4 not in frozen), "x Aᵀ is kept for B's gradient"
    out.sum().backward()
    assert all(given[i].grad is None for i in frozen)


def test_layers_with_the_same_input_keep_one() -> None:
    given = inputs()
    kept: set[int] = set()
    with saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        outs = [lora_linear(*given) for _ in range(3)]
    assert sum(o.numel() for o in outs) == 180
    assert given[0].data_ptr() in kept


def test_factors_may_be_wider_than_the_layer() -> None:
    x, W, b, A, B, s = inputs(torch.bfloat16)
    A, B = (t.detach().float().requires_grad_() for t in (A, B))
    out = lora_linear(x, W, b, A, B, s)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    wide = lora_linear_plain(*(t.detach().double() for t in (x, W, b, A, B)), s)
    torch.testing.assert_close(out.double(), wide, rtol=2e-2, atol=5e-2)


def test_autocast_casts_the_products() -> None:
    x, W, b, A, B, s = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_linear(x, W, b, A, B, s)
        assert out.dtype == lora_linear_plain(x, W, b, A, B, s).dtype == torch.bfloat16
    out.float().sum().backward()
    assert A.grad.dtype == x.grad.dtype == torch.float32
