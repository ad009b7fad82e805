"""adafactor is torch's, to the bit, but for ε₁; with that it is 🤗's too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as HuggingFace

from fallline.errors import InputError
from fallline.noise import rng
from fallline.optim import create
from fallline.optim.adafactor import Adafactor
from fallline.optim.roles import DECAYED

from .parameters import equal, gradient, make, parameters, train, values


def test_it_is_torchs_to_the_bit():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = make("adafactor", ours, {"lr": 0.1, "weight_decay": 0.1})
    groups = [
        {"params": [p for p, role in theirs.values() if (role in DECAYED) is decayed], "weight_decay": decay}
        for decayed, decay in ((True, 0.1), (False, 0.0))
    ]
    other = torch.optim.Adafactor(groups, lr=0.1, eps=(1e-15, 1e-3))
    for opt, params in ((optimizer, ours), (other, theirs)):
        train(opt, params, 0, 20)
    assert isinstance(optimizer, Adafactor)
    assert isinstance(optimizer, torch.optim.Adafactor)
    assert equal(values(ours), values(theirs))


def test_agrees_with_hugging_face():
    """Fifty steps without weight decay, which there goes by the relative step."""
    ours, theirs = parameters(), parameters()
    optimizer = make("adafactor", ours, {"lr": 0.1})
    other = HuggingFace([p for p, _ in theirs.values()], lr=0.1, relative_step=False)
    for step in range(50):
        for params in (ours, theirs):
            for name, (p, _) in params.items():
                p.grad = 1e-3 * torch.randn(p.shape, generator=rng(1, step, name), dtype=torch.float64)
        optimizer.step()
        other.step()
    for name, value in values(ours).items():
        torch.testing.assert_close(value, values(theirs)[name], rtol=1e-9, atol=1e-9)


def test_float16_is_refused():
    """Its least number is 6e-8, squares of gradients are smaller."""
    with pytest.raises(InputError, match=r"'a\.weight' is float16, .* use float32 or bfloat16"):
        create("adafactor", [("a.weight", nn.Parameter(torch.ones(2, 3, dtype=torch.float16)))])


def test_the_size_of_gradients_does_not_matter():
    """Their squares are far above our ε₁, 1e-15; with torch's, 1e-7, small gradients take other steps."""

    def after(make: Callable[[nn.Parameter], torch.optim.Optimizer], size: float) -> Tensor:
        p = nn.Parameter(gradient(99, "a", (7, 3)).float())
        optimizer = make(p)
        for step in range(10):
            p.grad = size * torch.randn(7, 3, generator=rng(1, step, "a"))
            optimizer.step()
        return p.detach()

    for size in (1e-3, 1e-6):
        ours, torchs = (
            (after(make, 1.0) - after(make, size)).abs().max()
            for make in (lambda p: create("adafactor", [("a.weight", p)]), lambda p: torch.optim.Adafactor([p]))
        )
        assert ours < 1e-5
        assert size > 1e-4 or torchs > 1e-2


def test_rank_one_squares_are_kept_exactly():
    """G² = r cᵀ: then V is G² itself, and the update the sign of G at the relative step."""
    r, c = torch.rand(7, 1, dtype=torch.float64) + 0.1, torch.rand(1, 3, dtype=torch.float64) + 0.1
    p = nn.Parameter(torch.full((7, 3), 2.0, dtype=torch.float64))
    optimizer = create("adafactor", [("a.weight", p)], lr=0.01)
    p.grad = -(r * c).sqrt()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((7, 3), 2.0 + 2.0 * 0.01).double())
