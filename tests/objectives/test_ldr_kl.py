"""What is special to ldr-kl, ldr-k and aldr-kl: their limits, and the temperature that aldr-kl finds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fallline.errors import InputError
from fallline.objectives.aldr_kl import ALDRKL, Config
from fallline.objectives.ldr_k import LDRK
from fallline.objectives.ldr_kl import LDRKL

N, V = 40, 12


def logits(words: int = V, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return scale * torch.randn(N, words, generator=g, dtype=torch.float64), torch.randint(words, (N, 1), generator=g)


def margins(z: Tensor, y: Tensor, c: float) -> Tensor:
    return (z - z.gather(1, y) + c).scatter(1, y, 0)


def of(rule: LDRKL | LDRK | ALDRKL, z: Tensor, y: Tensor) -> Tensor:
    return rule(z.clone(), y, False)[0]


@pytest.mark.parametrize("c", [0.0, 0.5])
def test_the_limits_of_ldr_kl(c: float) -> None:
    z, y = logits()
    d = margins(z, y, c)
    hinge, mean, spread = d.amax(1), d.mean(1), d.amax(1) - d.amin(1)
    for temperature in (1e-3, 0.1, 1.0, 1e3):  # λ → 0 the hinge loss, λ → ∞ the mean, with what is left bounded
        loss = of(LDRKL(temperature, c), z, y)
        slack = 1e-9
        assert bool((loss <= hinge + slack).all())
        assert bool((loss >= hinge - temperature * math.log(V) - slack).all())
        assert bool((loss >= mean - slack).all())
        assert bool((loss <= mean + spread**2 / (8 * temperature) + slack).all())
    likelihood = F.cross_entropy(z, y.squeeze(1), reduction="none")
    torch.testing.assert_close(of(LDRKL(1.0, 0.0), z, y), likelihood - math.log(V))


def test_robust_to_uniform_noise_in_the_limit() -> None:
    """Summed over all labels the mean of δ is constant: labels at random teach nothing."""
    z, _ = logits()
    total = sum(of(LDRK(V, 0.0), z, torch.full((N, 1), y)) for y in range(V))
    torch.testing.assert_close(total, torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_limits_of_ldr_k() -> None:
    z, y = logits()
    d = margins(z, y, 0.4)
    torch.testing.assert_close(of(LDRK(1, 0.4), z, y), d.amax(1))  # Crammer and Singer
    torch.testing.assert_close(of(LDRK(V, 0.4), z, y), d.mean(1))
    family = torch.stack([of(LDRK(k, 0.4), z, y) for k in range(1, V + 1)])
    assert bool((family.diff(dim=0) <= 1e-12).all())
    with pytest.raises(InputError, match=f"'k' must be at most {V}, the model's words, got {V + 1}"):
        of(LDRK(V + 1, 0.0), z, y)


@pytest.mark.parametrize(("temperature", "alpha"), [(10.0, 2.0), (1.0, 2.0), (0.1, 1.1)])
@pytest.mark.parametrize("words", [V, 5000])
def test_aldrs_temperature_is_stationary_and_in_its_interval(temperature: float, alpha: float, words: int) -> None:
    """With as many steps as the default, at any confidence."""
    rule = ALDRKL(temperature, alpha, 0.1, Config().iterations)
    for scale in (0.01, 1.0, 3.0, 30.0):
        z, _ = logits(words, scale)
        u = z - z.amax(1, keepdim=True)
        found = rule.solve(u)
        assert bool((found >= temperature * (1 - 1 / alpha)).all())
        assert bool((found <= temperature).all())
        p = torch.softmax(u / found, 1)
        divergence = (p * (p.clamp(min=1e-300) * words).log()).sum(1, keepdim=True)
        wanted = temperature * (1 - divergence / (alpha * math.log(words)))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8 * temperature)


def test_aldr_of_a_sure_and_of_an_undecided_model() -> None:
    z = torch.zeros(2, V, dtype=torch.float64)
    z[1, 0] = 1e4
    found = ALDRKL(5.0, 2.0, 0.0, Config().iterations).solve(z - z.amax(1, keepdim=True))
    assert found.tolist() == [[5.0], [2.5]]
    one = torch.zeros(1, 1)
    for rule in (LDRKL(2.0, 0.3), LDRK(1, 0.3), ALDRKL(2.0, 2.0, 0.3, 4)):  # a vocabulary of one word
        value, slope = rule(one.clone(), torch.zeros(1, 1, dtype=torch.long), True)
        assert value.tolist() == [0.0]
        assert slope is not None
        assert slope.tolist() == [[0.0]]
