"""ROC, areas and intervals against scikit-learn, SciPy and a bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from fallline.metrics.roc import auc, clopper_pearson, curve, tpr_at


def drawn(seed: int, shift: float, ties: bool, m: int = 60, n: int = 90) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    score = np.concatenate([random.normal(shift, 1, m), random.normal(0, 1.5, n)])
    return np.round(score) if ties else score, np.arange(m + n) < m


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1.0, 9.0])
def test_the_curve_and_its_area_are_scikit_learns(ties: bool, shift: float) -> None:
    for seed in range(5):
        score, positive = drawn(seed, shift, ties)
        false, true = curve(score, positive)
        whole = roc_curve(positive, score, drop_intermediate=False)
        theirs = {(round(a, 9), round(b, 9)) for a, b in zip(*whole[:2], strict=True)}
        assert {(round(a, 9), round(b, 9)) for a, b in zip(false, true, strict=True)} <= theirs
        assert auc(score, positive).value == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
        assert np.trapezoid(true, false) == pytest.approx(auc(score, positive).value, abs=1e-12)
        for fpr in (0.0, 0.01, 0.1, 1.0):
            assert tpr_at(score, positive, fpr).value == whole[1][whole[0] <= fpr + 1e-9].max()


def test_delong_is_what_a_bootstrap_finds() -> None:
    score, positive = drawn(0, 1.0, True, 80, 120)
    found = auc(score, positive)
    random = np.random.default_rng(1)
    high, low = score[positive], score[~positive]
    again = []
    for _ in range(400):
        a, b = random.choice(high, len(high)), random.choice(low, len(low))
        again.append(auc(np.concatenate([a, b]), positive).value)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * np.std(again), rel=0.1)


def test_intervals_hold_the_true_area() -> None:
    """Of 400 samples, 95 % within three standard errors; the true area of two normals is Φ(1 / √3.25)."""
    truth, held = 0.7104, 0
    for seed in range(400):
        _, low, high = auc(*drawn(seed, 1.0, False))
        held += low <= truth <= high
    assert abs(held / 400 - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 400)


def test_a_perfect_score_is_not_certain() -> None:
    positive = np.arange(30) < 10
    value, low, high = auc(positive * 1.0, positive)
    assert (value, high) == (1.0, 1.0)
    assert low == pytest.approx(binomtest(10, 10).proportion_ci(0.95, "exact").low)
    assert auc(1.0 - positive, positive) == pytest.approx((0.0, 0.0, 1 - low))
    assert auc(np.zeros(30), positive) == (0.5, 0.5, 0.5)


def test_nearly_perfect_is_no_surer_than_perfect() -> None:
    """One pair of 10 · 20 the wrong way round."""
    positive = np.arange(30) < 10
    score = np.where(positive, 1.0, 0.0)
    score[0], score[10] = 0.5, 0.6
    value, low, high = auc(score, positive)
    assert value == pytest.approx(1 - 1 / 200)
    assert (low, high) == (pytest.approx(binomtest(10, 10).proportion_ci(0.95, "exact").low), 1.0)
    assert auc(-score, positive) == pytest.approx((1 - value, 0.0, 1 - low))


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 64), (3, 64), (64, 64), (500, 2000), (1999, 2000)])
def test_clopper_and_pearson_are_scipys(hits: int, trials: int) -> None:
    theirs = binomtest(hits, trials).proportion_ci(0.95, "exact")
    assert clopper_pearson(hits, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
