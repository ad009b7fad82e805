"""Bases of subspaces: orthonormal, near the best, followed from update to update, and found at the right times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fallline.noise import rng
from fallline.optim.subspace import Finder, Subspace, iterated, leading, tall
from fallline.optim.transform import Context


def matrix(m: int, n: int, step: int = 0, decay: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random, its singular values falling as k^(−decay)."""
    X = torch.randn(m, n, generator=rng(0, step, "x"), dtype=torch.float64)
    U, _, V = torch.linalg.svd(X, full_matrices=False)
    sizes = torch.arange(1, len(V) + 1, dtype=torch.float64) ** -decay
    return ((U * sizes) @ V).to(dtype)


def context(G: Tensor, step: int, name: str = "a.weight") -> Context:
    return Context(name, G, G, step, torch.tensor(1.0), 0)


def test_long_side_comes_first():
    assert tall(torch.zeros(5, 3)).shape == tall(torch.zeros(3, 5)).shape == (5, 3)


@pytest.mark.parametrize("finder", ["iteration", "svd"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)], ids=str)
@pytest.mark.parametrize("rank", [1, 6, 24, 99])
def test_rows_are_orthonormal(finder: Finder, shape: tuple[int, int], rank: int):
    subspace = Subspace(rank, 1, finder, spread=True)
    state = subspace.init(torch.zeros(shape))
    for step in range(20):
        X = tall(matrix(*shape, step=step, decay=1.0, dtype=torch.float32)) * 10.0 ** (-8 * (step % 3))
        if step % 4 == 3:
            X[:, : step % 24] = 0
        P = subspace.basis(X, state, context(X, step))
        assert P.shape == (min(rank, 24), 24)
        assert (P @ P.t() - torch.eye(len(P))).abs().max() < 1e-5


def test_singular_vectors_have_their_largest_entry_positive():
    X = matrix(30, 20)
    P = leading(X, 5)
    torch.testing.assert_close((X @ P.t()).norm(dim=0), torch.linalg.svdvals(X)[:5])
    assert (P.gather(1, P.abs().argmax(1, keepdim=True)) > 0).all()


def held(X: Tensor, P: Tensor) -> float:
    """‖X Pᵀ‖², as a share of what the best directions hold."""
    return ((X @ P.t()).square().sum() / torch.linalg.svdvals(X)[: len(P)].square().sum()).item()


@pytest.mark.parametrize(("decay", "least"), [(0.5, 0.98), (1.0, 0.998), (2.0, 0.9999)])
def test_the_first_basis_is_near_the_best(decay: float, least: float):
    """Of the share of ‖X‖² that can be held; spectra from gentle to steep."""
    for shape, rank in (((160, 96), 24), ((64, 64), 8)):
        subspace, X = Subspace(rank, 200, "iteration", spread=True), matrix(*shape, decay=decay)
        assert held(X, subspace.basis(X, subspace.init(X), context(X, 0))) > least


def test_under_a_gap_the_iteration_finds_the_singular_vectors():
    X = matrix(40, 24, decay=3.0)
    P = leading(X, 4)
    Q = iterated(X, torch.randn(4, 24, generator=rng(0, 0, "y"), dtype=torch.float64), 12)
    torch.testing.assert_close((Q @ P.t()).abs(), torch.eye(4).double(), rtol=0, atol=1e-4)


def test_it_follows_a_gradient_that_drifts():
    """One step a time holds what a decomposition would, and every row stays on the side where it was."""
    subspace = Subspace(6, 1, "iteration", spread=True)
    state = subspace.init(torch.zeros(40, 24).double())
    A, B = matrix(40, 24, 0, decay=1.0), matrix(40, 24, 1, decay=1.0)
    before = None
    for step in range(60):
        X = A * (1 - step / 60) + B * step / 60
        P = subspace.basis(X, state, context(X, step)).clone()
        if step > 3:
            assert held(X, P) > 0.99
            assert ((P * before).sum(1) > 0).all()
        before = P


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_iteration_is_its_equation(dtype: torch.dtype):
    X, P = matrix(40, 24, decay=0.5, dtype=dtype), leading(matrix(40, 24, 1, dtype=dtype), 6)
    Y, Q = X.double().numpy(), P.double().numpy()
    for _ in range(3):
        Q, T = np.linalg.qr((Y.T @ Y / np.sum(Y**2) + 1e-5 * np.eye(24)) @ Q.T)
        Q = (Q * np.sign(np.diag(T))).T
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(iterated(X, P, 3).numpy(), Q, rtol=0, atol=tolerance)


def test_directions_without_gradient_stay():
    P = leading(matrix(40, 24), 6)
    torch.testing.assert_close(iterated(torch.zeros(40, 24).double(), P, 1), P, rtol=0, atol=1e-12)
    X = matrix(40, 1) @ P[:1]  # one direction only
    torch.testing.assert_close(iterated(X, P, 3), P, rtol=0, atol=1e-9)


@pytest.mark.parametrize("finder", ["iteration", "svd", "gaussian"])
def test_a_basis_is_finite_whatever_comes(finder: Finder):
    subspace = Subspace(3, 1, finder, spread=True)
    state = subspace.init(torch.zeros(8, 5))
    for step, value in enumerate((float("nan"), 1.0, float("inf"), 0.0, 1e30, 1e-30)):
        X = torch.full((8, 5), value)
        assert subspace.basis(X, state, context(X, step)).isfinite().all()


def test_random_bases_depend_on_seed_update_and_name():
    subspace = Subspace(200, 1, "gaussian", spread=True)
    X = torch.zeros(500, 300)
    drawn = [
        subspace.find(X, None, Context(name, X, X, step, torch.tensor(1.0), seed))
        for name, step, seed in (("a", 0, 0), ("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert all(not torch.equal(drawn[0], other) for other in drawn[2:])
    assert drawn[0].std() == pytest.approx(200**-0.5, rel=0.02)


def test_all_are_found_at_first_and_then_each_at_its_own_time():
    found: dict[bool, dict[str, list[int]]] = {}
    for spread in (True, False):
        found[spread] = {}
        for name in (f"layers.{i}.up.weight" for i in range(40)):
            subspace = Subspace(2, 7, "gaussian", spread=spread)
            state, times = subspace.init(torch.zeros(4, 4)), []
            for step in range(29):
                if subspace.due(state, context(torch.zeros(4, 4), step, name)):
                    times.append(step)
                subspace.basis(torch.ones(4, 4), state, context(torch.zeros(4, 4), step, name))
            found[spread][name] = times
    assert all(times == [0, 7, 14, 21, 28] for times in found[False].values())
    assert all(times[0] == 0 and times[1] <= 7 for times in found[True].values())
    assert all(set(np.diff(times[1:])) == {7} for times in found[True].values())
    assert {times[1] for times in found[True].values()} == set(range(1, 8))


def test_it_does_not_write_to_the_gradient():
    for finder in ("iteration", "svd", "gaussian"):
        subspace: Any = Subspace(2, 1, finder, spread=True)
        p = nn.Parameter(torch.zeros(6, 4))
        X = torch.full((6, 4), float("nan"))
        X[0] = 1.0
        before = X.clone()
        subspace.basis(X, subspace.init(p), context(X, 0))
        torch.testing.assert_close(X, before, equal_nan=True)
