from __future__ import annotations

import math
import sys

import pytest
from opacus.accountants.analysis import rdp
from opacus.accountants.prv import PRVAccountant

from fallline.errors import InputError
from fallline.privacy import accountant, calibrated, epsilon


@pytest.mark.parametrize(
    ("rate", "steps", "expected"),
    [(0.01, 1000, 1.828), (1.0, 10, 17.857)],  # dp-accounting 0.6.0, at z = 1 and δ = 1e-5
)
def test_oracle_values(rate: float, steps: int, expected: float) -> None:
    assert epsilon(1.0, rate, steps, 1e-5) == pytest.approx(expected, abs=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opacus_agrees() -> None:
    noise, rate, steps, delta = 1.1, 256 / 60000, 10000, 1e-5
    ours = epsilon(noise, rate, steps, delta)
    prv = PRVAccountant()
    prv.history = [(noise, rate, steps)]
    assert ours == pytest.approx(prv.get_epsilon(delta), rel=0.02)
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    loose, _ = rdp.get_privacy_spent(
        orders=orders, rdp=rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders), delta=delta
    )
    assert ours <= loose <= 1.2 * ours


def test_composition_of_gaussians() -> None:
    assert epsilon(3.0, 1.0, 9, 1e-4) == pytest.approx(epsilon(1.0, 1.0, 1, 1e-4), rel=1e-3)


def test_no_noise_is_not_private() -> None:
    assert epsilon(0.0, 0.1, 10, 1e-5) == math.inf


def test_calibrated_noise_keeps_the_promise_and_not_much_more() -> None:
    noise = calibrated(2.0, 1.0, 10, 1e-5)
    assert 1.99 < epsilon(noise, 1.0, 10, 1e-5) <= 2.0


def test_who_did_the_sums() -> None:
    assert accountant().startswith("PLD, dp-accounting 0.")


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(InputError, match=r"pip install 'fallline\[private\]'"):
        epsilon(1.0, 0.123, 10, 1e-5)
