"""The polar factor: what the iteration makes of singular values, its symmetries, and the two forms of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fallline.polar as module
from fallline.noise import rng
from fallline.polar import Preset, coefficients, polar

both = pytest.mark.parametrize("preset", ["newton-schulz", "polar-express"])
shapes = pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)], ids=str)


def orthogonal(n: int, stream: str) -> Tensor:
    """[n, n], float64."""
    return torch.linalg.qr(random(n, n, stream=stream))[0]


def random(*shape: int, stream: str = "x") -> Tensor:
    return torch.randn(shape, generator=rng(0, 0, stream), dtype=torch.float64)


def with_spectrum(sigma: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """X [m, n] with these singular values, and its U Vᵀ."""
    U, V = orthogonal(m, "U")[:, : len(sigma)], orthogonal(n, "V")[:, : len(sigma)]
    return U * sigma @ V.T, U @ V.T


def spectrum(least: float, size: int = 24) -> Tensor:
    """Singular values, log-uniform, the smallest `least` by the Frobenius norm."""
    low, high = 0.0, 40.0
    for _ in range(60):
        rate = (low + high) / 2
        sigma = torch.exp(-rate * torch.linspace(0, 1, size, dtype=torch.float64))
        low, high = (rate, high) if sigma.min() / sigma.norm() > least else (low, rate)
    return sigma


@shapes
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-3), (torch.float32, 2e-3)], ids=str)
@pytest.mark.parametrize(
    ("preset", "steps", "least", "low", "high"),
    [
        ("newton-schulz", 5, 1e-2, 0.682, 1.134),
        ("newton-schulz", 5, 1e-3, 0.471, 1.202),
        ("polar-express", 5, 2e-3, 0.859, 1.141),
        ("polar-express", 5, 1e-3, 0.847, 1.141),
        ("polar-express", 6, 1e-3, 0.993, 1.007),
        ("polar-express", 7, 1e-3, 0.99998, 1.00002),
    ],
)
def test_singular_values(preset: Preset, steps: int, least: float, low: float, high: float, shape, dtype, slack):
    X, _ = with_spectrum(spectrum(least), *shape)
    found = torch.linalg.svdvals(polar(X.to(dtype), preset, steps).double())
    assert low - slack <= found.min() <= found.max() <= high + slack


@shapes
@both
def test_singular_values_go_through_the_polynomials(preset: Preset, shape: tuple[int, int]):
    for steps in (1, 2, 3, 4, 5, 6, 10):
        sigma = spectrum(1e-3)
        X, _ = with_spectrum(sigma, *shape)
        s, polynomials = coefficients(preset, steps)
        assert len(polynomials) == steps
        sigma = sigma / (s * sigma.norm())
        for a, b, c in polynomials:
            sigma = a * sigma + b * sigma**3 + c * sigma**5
        expected, _ = with_spectrum(sigma, *shape)
        torch.testing.assert_close(polar(X, preset, steps), expected, rtol=0, atol=1e-9)


@shapes
def test_eight_steps_are_the_polar_factor(shape: tuple[int, int]):
    X, expected = with_spectrum(spectrum(2e-3), *shape)
    torch.testing.assert_close(polar(X, "polar-express", 8), expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(polar(X, "polar-express", 11), expected, rtol=0, atol=1e-8)


@shapes
@both
def test_symmetries(preset: Preset, shape: tuple[int, int]):
    X = random(*shape)
    m, n = shape
    P, Q = orthogonal(m, "P"), orthogonal(n, "Q")
    expected = polar(X, preset)
    torch.testing.assert_close(polar(X.T, preset), expected.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(polar(P @ X @ Q, preset), P @ expected @ Q, rtol=0, atol=1e-10)
    for factor in (1e-6, 1e6):
        torch.testing.assert_close(polar(factor * X, preset), expected, rtol=0, atol=1e-10)


@shapes
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_are_each_by_itself(preset: Preset, shape: tuple[int, int], dtype: torch.dtype):
    X = random(2, 3, *shape).to(dtype)
    expected = torch.stack([torch.stack([polar(x, preset) for x in row]) for row in X])
    torch.testing.assert_close(polar(X, preset), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@both
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 1e-11)], ids=str)
@pytest.mark.parametrize("steps", [5, 8])
def test_gram_form_is_the_plain_form(
    preset: Preset, dtype: torch.dtype, atol: float, steps: int, monkeypatch: pytest.MonkeyPatch
):
    """Full rank with a wide spectrum, and rank three, where rounding is all there is of R's other eigenvalues."""
    for X in (with_spectrum(spectrum(1e-3), 24, 60)[0], random(24, 3, stream="a") @ random(3, 60, stream="b")):
        found = []
        for start in (1.0, float("inf")):
            monkeypatch.setattr(module, "GRAM_FROM", start)
            found.append(polar(X.to(dtype), preset, steps))
        assert not torch.equal(*found)
        torch.testing.assert_close(*found, rtol=0, atol=20 * atol if steps > 5 else atol)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zero_stays_zero_and_the_input_as_it_was(preset: Preset, dtype: torch.dtype):
    X = torch.zeros(2, 4, 3, dtype=dtype)
    X[1] = random(4, 3).to(dtype)
    before = X.clone()
    found = polar(X, preset)
    assert found.dtype == dtype
    assert found.shape == X.shape
    assert torch.equal(X, before)
    assert not found[0].any()
    assert found[1].isfinite().all()
    assert found[1].any()


def test_half_precision_is_worked_in_float32():
    X = random(24, 60).bfloat16()
    torch.testing.assert_close(polar(X), polar(X.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1), (0, 3), (3, 0), (0, 2, 3)], ids=str)
def test_thin_and_empty(shape: tuple[int, ...]):
    X = random(*shape)
    found = polar(X, "polar-express", 8)
    assert found.shape == X.shape
    if X.numel():
        torch.testing.assert_close(found, X / X.norm())


def test_nan_is_shown():
    X = random(2, 3, 4)
    X[0, 1, 1] = float("nan")
    found = polar(X)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
