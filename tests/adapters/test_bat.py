"""BAT against a loop over blocks, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fallline.adapters import attach, merge, unmerge
from fallline.adapters.layers import adapted
from fallline.kernels.block_linear import block_linear, block_linear_plain

from .models import fit, llama, logits


def given(lead: tuple[int, ...] = (2, 5), dtype: torch.dtype = torch.float64) -> list[Any]:
    noise = torch.Generator().manual_seed(0)
    shapes = [(*lead, 9), (6, 9), (6,), (2, 3, 3)]
    x, W, b, D = (torch.randn(s, generator=noise, dtype=torch.float64).to(dtype) for s in shapes)
    return [x.requires_grad_(), W, b, D.requires_grad_()]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("lead", [(2, 5), (0,), ()])
def test_values_and_gradients_are_those_of_the_loop(whole: bool, lead: tuple[int, ...]) -> None:
    x, W, b, D = given(lead)
    for turned, bias in ((W, b), (W.t().contiguous().t(), None)):
        found, plain = block_linear(x, turned, bias, D, whole), block_linear_plain(x, turned, bias, D, whole)
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
        up = torch.randn(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        both = [torch.autograd.grad(y, (x, D), up) for y in (found, plain)]
        torch.testing.assert_close(both[0], both[1], rtol=1e-12, atol=1e-12)


def test_derivatives_are_right_to_second_order() -> None:
    x, W, b, D = given((3,))
    assert torch.autograd.gradcheck(lambda x, D: block_linear(x, W, b, D), (x, D))
    assert torch.autograd.gradgradcheck(lambda x, D: block_linear(x, W, b, D), (x, D))


def test_the_changed_weight_is_not_kept() -> None:
    x, W, b, D = given()
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block_linear(x, W, b, D)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, W, D)}, "only what is there anyway"


def test_a_narrow_weight_is_changed_in_the_dtype_of_the_blocks() -> None:
    x, W, b, D = given(dtype=torch.bfloat16)
    D = D.detach().float().requires_grad_()
    y = block_linear(x, W, b, D)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert D.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    true = block_linear_plain(*(t.detach().double() for t in (x, W, b, D)))
    torch.testing.assert_close(y.double(), true, rtol=2e-2, atol=5e-2)


def test_a_weight_that_is_thawed_gets_its_part_of_the_gradient() -> None:
    x, W, b, D = given()
    model = attach(torch.nn.Sequential(torch.nn.Linear(9, 6)).double(), "bat", rank=3)
    layer = adapted(model)["0"]
    layer.adapters["default"].D.data.copy_(D)
    layer.weight.data.copy_(W)
    layer.bias.data.copy_(b)
    layer.weight.requires_grad_(True)
    W.requires_grad_(True)
    wanted = torch.autograd.grad(block_linear_plain(x, W, b, D).sum(), (W, D))
    found = torch.autograd.grad(model(x).sum(), (layer.weight, layer.adapters["default"].D))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_change_depends_on_the_weight_has_full_rank_and_comes_off() -> None:
    model = attach(llama(), "bat", rank=4)
    fit(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    tuned = logits(model)
    for layer in adapted(model).values():
        W, P = layer.matrix().detach(), layer.adapters["default"]
        delta = layer.methods["default"].delta(P, layer.matrix)
        assert torch.linalg.matrix_rank(delta.double()) == min(W.shape) > 4
        eye = torch.eye(4)
        cut = (W + delta).view(-1, 4, W.shape[1] // 4, 4).transpose(1, 2)  # the paper's way back
        back = torch.linalg.solve((eye + P.D)[:, None], cut - P.D[:, None], left=False)
        torch.testing.assert_close(back.transpose(1, 2).reshape(W.shape), W, rtol=1e-4, atol=1e-5)
    merge(model, keep=True)
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=2e-5)
    unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), tuned)
