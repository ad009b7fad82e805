"""What is special to SWAN: rows, the spectrum and its empty direction, the norm, and what does not matter."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from fallline.noise import rng
from fallline.optim import create, muon
from fallline.optim.normalise import Standardise
from fallline.optim.transform import Context

from .parameters import SHAPES, gradient

SQUARE, WIDE, TALL = (32, 32), (24, 60), (60, 24)

shapes = pytest.mark.parametrize("shape", [SQUARE, WIDE, TALL], ids=str)


def random(*shape: int, step: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(0, step, "x"), dtype=torch.float64)


def standardised(G: Tensor) -> Tensor:
    return Standardise().update(G.clone(), {}, Context("a", G, G, 0, torch.tensor(1.0), 0))


def one_update(G: Tensor, **options: object) -> Tensor:
    """The first update, divided by the step of matrices."""
    p = nn.Parameter(torch.zeros_like(G))
    p.grad = G.clone()
    create("swan", [("a.weight", p)], lr=1.0, matrix_lr_ratio=1.0, **options).step()
    return -p.detach()


@shapes
def test_rows_have_mean_zero_and_deviation_one(shape: tuple[int, int]):
    """Columns of a tall matrix."""
    X = standardised(3 + 5 * random(*shape))
    X = X.T if shape == TALL else X
    assert X.mean(dim=1).abs().max() < 1e-13
    torch.testing.assert_close(X.std(dim=1, correction=0), torch.ones(min(shape), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_rows_become_zero_and_the_update_is_finite(dtype: torch.dtype):
    """Also where their mean is not exact, so that rounding is all that is left of them."""
    G = random(12, 1000).to(dtype)
    G[3], G[5], G[7] = 0, 0.1, 1e6 / 3
    X = standardised(G)
    assert not X[[3, 5, 7]].any()
    U = one_update(G)
    assert U.isfinite().all()
    assert not U[[3, 5, 7]].any()
    assert not one_update(torch.full((6, 1), 0.3, dtype=dtype)).any()


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_update_is_the_polar_factor_at_the_norm_of_standardised_rows(shape: tuple[int, int], dtype: torch.dtype):
    """A square one is of rank n − 1: rounding noise in the direction of row means stays noise."""
    m, n = shape
    G = random(m, n) + 2
    X = standardised(G)
    V, sigma, W = torch.linalg.svd(X, full_matrices=False)
    rank = min(m, n, max(m, n) - 1)
    assert (sigma > 1e-3 * sigma.norm()).sum() >= rank - 1
    D = V[:, :rank] @ W[:rank]
    U = one_update(G.to(dtype), ns_steps=10).double()
    torch.testing.assert_close(U, D * sqrt(m * n) / sqrt(rank), rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-3)
    assert U.norm().item() == pytest.approx(sqrt(m * n), rel=1e-6)
    empty = (U @ torch.full((n,), 1 / sqrt(n), dtype=torch.float64)).norm() / U.norm()
    if m == n:
        assert empty < (1e-11 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_empty_direction_stays_empty_in_a_large_square_matrix(dtype: torch.dtype):
    G = random(512, 512).to(dtype)
    U = one_update(G).double()
    sigma = torch.linalg.svdvals(U) / U.norm() * sqrt(511)
    assert sigma[-1] < (1e-9 if dtype == torch.float64 else 1e-3)
    assert sigma[-4] > 0.9
    assert sigma[0] < 1.1


@shapes
def test_means_and_scales_of_rows_do_not_matter(shape: tuple[int, int]):
    """Nor of columns of a tall matrix."""
    G, m = random(*shape), min(shape)
    scales, means = random(m, 1, step=1).exp(), random(m, 1, step=2)
    other = scales.T * G + means.T if shape == TALL else scales * G + means
    torch.testing.assert_close(one_update(other), one_update(G), rtol=0, atol=1e-8)


def test_both_factors_of_an_adapter_of_rank_one_move():
    for shape in ((1, 20), (20, 1)):
        assert one_update(random(*shape)).norm().item() == pytest.approx(sqrt(20))


def test_rows_of_zeros_happen_on_the_inputs_of_the_common_tests():
    """Else the test of the equation would not see them."""
    zero = 0
    for step in range(50):
        for name, (role, shape) in SHAPES.items():
            if role == "matrix":
                G = gradient(step, name, shape).flatten(1)
                G = G.T if G.shape[0] > G.shape[1] else G
                zero += (G == 0).all(dim=1).any().item()
    assert zero == 100


@pytest.mark.parametrize("batch", [1, 2 * 60 * 24 * 4, 1 << 22], ids=["one", "two", "all"])
@pytest.mark.parametrize("id", ["swan", "mngd"])
def test_matrices_in_batches_are_matrices_one_by_one(id: str, batch: int, monkeypatch: pytest.MonkeyPatch):
    """Two shapes mixed, one matrix without a gradient now and then, so that batches change."""
    monkeypatch.setattr(muon, "BATCH", {"cpu": batch})
    found = []
    for plain in (False, True):
        params = {f"{i}.weight": nn.Parameter(random(*(TALL if i % 2 else WIDE), step=i).float()) for i in range(7)}
        optimizer = create(id, params.items(), lr=0.02, weight_decay=0.1)
        optimizer.plain = plain
        for step in range(4):
            for i, p in enumerate(params.values()):
                p.grad = None if (step + i) % 4 == 0 else random(*p.shape, step=10 * step + i).float()
            optimizer.step()
        found.append({name: p.detach() for name, p in params.items()})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=2e-6)
