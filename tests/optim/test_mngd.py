"""What is special to MNGD: each projection, and the methods that are settings of it."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fallline.errors import InputError
from fallline.noise import rng
from fallline.optim import create
from fallline.optim.mngd import Config, Norm


def random(*shape: int, step: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(0, step, "x"), dtype=torch.float64)


def trained(id: str, gradients: list[Tensor], plain: bool = False, **options: Any) -> Tensor:
    """The parameter after an update for each gradient, from ones."""
    p = nn.Parameter(torch.ones_like(gradients[0]))
    optimizer = create(id, [("a.weight", p)], lr=0.1, **options)
    optimizer.plain = plain
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def one_update(G: Tensor, **options: Any) -> Tensor:
    return (1 - trained("mngd", [G], matrix_lr_ratio=1.0, **options)) / 0.1


SIZES = {
    "row": lambda X: X.norm(dim=1).max() / sqrt(X.shape[1]),
    "column": lambda X: X.norm(dim=0).max() / sqrt(X.shape[0]),
    "spectral": lambda X: torch.linalg.matrix_norm(X, 2) / sqrt(max(X.shape)),
    "max": lambda X: X.abs().max(),
}
"""The norms g of the docstring."""

DUALS = {
    "row": lambda X: X.norm(dim=1).sum() * sqrt(X.shape[1]),
    "column": lambda X: X.norm(dim=0).sum() * sqrt(X.shape[0]),
    "spectral": lambda X: torch.linalg.matrix_norm(X, "nuc") * sqrt(max(X.shape)),
    "max": lambda X: X.abs().sum(),
}


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)], ids=str)
@pytest.mark.parametrize("norm", SIZES)
def test_a_projection_is_the_steepest_direction_of_unit_norm(norm: Norm, shape: tuple[int, int]):
    """⟨G, X⟩ is the dual norm of G, which is the most that any X with g(X) ≤ 1 can have."""
    G = random(*shape)
    X = one_update(G, norms=(norm,))
    assert SIZES[norm](X).item() == pytest.approx(1, rel=1e-6)
    assert (G * X).sum().item() == pytest.approx(DUALS[norm](G).item(), rel=1e-6)
    assert X.square().mean().sqrt().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
@pytest.mark.parametrize("iterations", [1, 5])
def test_rows_and_columns_are_sinkgd(plain: bool, iterations: int):
    for shape in ((8, 20), (20, 8), (4, 3, 2)):
        gradients = [random(*shape, step=step) for step in range(10)]
        found = trained("mngd", gradients, plain, norms=("row", "column"), iterations=iterations, weight_decay=0.1)
        expected = trained("sinkgd", gradients, iterations=iterations, weight_decay=0.1)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 20), (12, 12)], ids=str)
def test_rows_and_spectral_once_are_swan_without_means(shape: tuple[int, int]):
    """On gradients of which each row has mean zero they agree: of a square matrix in direction, its rank is n − 1."""
    G = random(*shape)
    centred = G - G.mean(dim=1, keepdim=True)
    found, expected = (
        trained(id, [centred], matrix_lr_ratio=1.0, **options) - 1
        for id, options in (("mngd", {"norms": ("row", "spectral")}), ("swan", {}))
    )
    rank = min(shape[0], shape[1] - 1)
    torch.testing.assert_close(found * sqrt(min(shape) / rank), expected, rtol=0, atol=1e-8)
    swan = trained("swan", [G], matrix_lr_ratio=1.0) - 1
    assert (one_update(G) * -0.1 - swan).norm() > 0.1 * swan.norm()


def test_one_pass_over_rows_and_spectral_is_a_fixed_point_of_a_wide_matrix_only():
    for shape, same in (((8, 20), True), ((20, 8), False)):
        G = random(*shape)
        once, often = (one_update(G, iterations=iterations) for iterations in (1, 4))
        assert torch.allclose(once, often, rtol=0, atol=1e-6) == same


def test_norms_are_checked():
    with pytest.raises(InputError, match="at least one of row, column, spectral, max"):
        Config(norms=())
    with pytest.raises(InputError, match="spectral"):
        Config(norms=("spectra",))
