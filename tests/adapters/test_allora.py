"""ALLoRA's gradients and factors against a dense form in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fallline.adapters import attach
from fallline.adapters.allora import row_factor
from fallline.adapters.layers import adapted
from fallline.errors import InputError
from fallline.kernels.row_scaled_lora import row_scaled_lora, row_scaled_lora_plain

from .models import llama, tokens


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(2, 5), (0,), ()])
def test_the_kernel_is_its_plain_form(bias: bool, lead: tuple[int, ...]) -> None:
    x, A, B = (drawn(*s, seed=i).requires_grad_() for i, s in enumerate(((*lead, 7), (3, 7), (6, 3))))
    W, b, c, g = drawn(7, 6).t(), drawn(6) if bias else None, drawn(6).abs(), drawn(*lead, 6, seed=9)
    ours, plain = row_scaled_lora(x, W, b, A, B, c), row_scaled_lora_plain(x, W, b, A, B, c)
    alone = row_scaled_lora(x, None, None, A, B, c)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone, x @ A.t() @ B.t(), rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(plain, (x, A, B), g)
    for y, dx in ((ours, wanted[0]), (alone, g @ (B @ A).detach())):
        for one, other in zip(torch.autograd.grad(y, (x, A, B), g), (dx, *wanted[1:]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_layer_scales_what_its_factors_are_told_and_nothing_else() -> None:
    """Every gradient written out from the paper's equations, with rows of very different norms."""
    eta = 1.5
    model = attach(torch.nn.Sequential(torch.nn.Linear(9, 7)).double(), "allora", rank=3, eta=eta)
    layer = adapted(model)["0"]
    P: Any = layer.adapters["default"]
    P.lora_B.data.copy_(drawn(7, 3) * 10.0 ** torch.arange(-4, 3)[:, None])
    P.lora_B.data[3] = 0
    A, B, W = (t.detach() for t in (P.lora_A, P.lora_B, layer.matrix()))
    x, g = drawn(4, 9, seed=1).requires_grad_(), drawn(4, 7, seed=2)
    c = 1 / ((B @ A).norm(dim=1) + 1 / eta**2).sqrt()
    assert c[3] == pytest.approx(eta)
    assert c.max() > 10 * c.min()
    y = model(x)
    torch.testing.assert_close(y, x @ (W + B @ A).t() + model[0].bias, rtol=1e-12, atol=1e-12)
    y.backward(g)
    G = c[:, None] * (g.t() @ x)
    torch.testing.assert_close(P.lora_B.grad, G @ A.t(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(P.lora_A.grad, B.t() @ G, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, g @ (W + B @ A), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    with pytest.raises(InputError, match="there is no second derivative; take lora"):
        torch.autograd.grad(model(x).sum(), P.lora_B, create_graph=True)


def test_the_factor_is_eta_at_zero_and_falls_with_the_norm() -> None:
    A, B = drawn(3, 9), drawn(1, 3, seed=1)
    found = [row_factor(A, size * B, 2.0).item() for size in (0, 1e-3, 0.1, 1, 10, 1e4)]
    assert found[0] == pytest.approx(2.0)
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(float((1e4 * B @ A).norm()) ** -0.5, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert row_factor(A.float(), B.float(), 2.0).dtype == torch.float32
        assert row_factor(A, B, 2.0).item() == found[3]


def test_with_sgd_b_leaves_zero_faster_than_in_lora() -> None:
    def after(id: str, **more: Any) -> tuple[list[float], float]:
        model = attach(llama(), id, rank=4, **more)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        norms = []
        for _ in range(10):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            B = [layer.adapters["default"].lora_B.detach().flatten() for layer in adapted(model).values()]
            norms.append(torch.cat(B).norm().item())
        return norms, loss.item()

    ours, loss = after("allora", eta=2.0)
    theirs, plain = after("lora", alpha=4.0, rslora=False)
    assert ours[0] == pytest.approx(2 * theirs[0], rel=1e-4)
    assert all(a > b for a, b in zip(ours, theirs, strict=True))
    assert loss < plain
