"""What is special to dco and dco-step: from answers that cannot be found to those that are certain."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch

from fallline.errors import InputError
from fallline.objectives import dco_step
from fallline.objectives.dco import coverage_loss

S = torch.cat([torch.zeros(1), torch.logspace(-12, 2, 50), torch.tensor([800.0, 5e3])]).double()


@pytest.mark.parametrize("samples", [1, 2, 256, 10**6])
def test_loss_and_its_derivative_at_any_probability(samples: int) -> None:
    """Against a hundred decimal digits, from p = 1 to where p is no number of 64 bits."""
    getcontext().prec = 100
    s = S.clone().requires_grad_()
    loss = coverage_loss(s, samples)
    (F,) = torch.autograd.grad(loss.sum(), s, create_graph=True)
    (bend,) = torch.autograd.grad(F.sum(), s)
    assert bool(bend.isfinite().all())
    wanted, slopes = [], []
    for value in S.tolist():
        if value == 0 or value > 100:  # no digits are enough
            wanted.append(max(0.0, value - math.log(samples)))
            slopes.append(float(value > 0))
            continue
        p = (-Decimal(value)).exp()
        missed = (1 - p) ** (samples - 1)
        found = 1 - missed * (1 - p)
        wanted.append(float(-found.ln()))
        slopes.append(float(samples * p * missed / found))
    torch.testing.assert_close(loss.detach(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(F.detach(), torch.tensor(slopes, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert bool((F.diff() >= -1e-9).all())  # the surer, the less is learned
    if samples == 1:
        torch.testing.assert_close(loss.detach(), S, rtol=1e-12, atol=1e-12)


def test_the_factor_falls_where_samples_would_find_it_anyway() -> None:
    s = -torch.tensor([1e-5, 1 / 256, 0.1]).double().log()
    s.requires_grad_()
    (F,) = torch.autograd.grad(coverage_loss(s, 256).sum(), s)
    assert F[0] > 0.99
    assert 0.5 < F[1] < 0.7
    assert F[2] < 1e-9


def test_steps_end_with_a_separator_and_with_the_example() -> None:
    labels = torch.tensor([[3, 9, 4, 5, 9, 2], [-100, 9, 9, 3, -100, -100]])
    rows = dco_step.steps({"labels": labels}, (9,))
    assert rows.tolist() == [[0, 0, 1, 1, 1, 2], [6, 6, 7, 8, 8, 8]]
    segment = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, -1, -1]])
    packed = dco_step.steps({"labels": labels, "segment": segment}, (9,))
    assert packed.tolist() == [[0, 0, 1, 2, 2, 3], [6, 6, 7, 8, 9, 9]]
    with pytest.raises(InputError, match="at least one token id"):
        dco_step.Config(samples=4, separators=())
