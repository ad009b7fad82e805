"""Means, paired differences, simultaneous intervals and verdicts, against values computed by hand or published."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest

from fallline.report.statistics import (
    compare,
    final_losses,
    interval,
    outcome,
    paired,
    sample,
    t_cdf,
    t_quantile,
)

from .records import choice, record, run


@pytest.mark.parametrize(
    ("p", "nu", "t"),
    [  # the usual published tables
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 3, 3.18245),
        (0.975, 4, 2.77645),
        (0.975, 9, 2.26216),
        (0.975, 10, 2.22814),
        (0.975, 30, 2.04227),
        (0.995, 1, 63.6567),
        (0.995, 2, 9.92484),
        (0.995, 5, 4.03214),
        (0.9995, 3, 12.9240),
        (0.90, 7, 1.41492),
        (0.95, 120, 1.65765),
        (0.5, 5, 0.0),
    ],
)
def test_quantiles_of_t_are_the_published_ones(p: float, nu: int, t: float) -> None:
    assert t_quantile(p, nu) == pytest.approx(t, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("nu", [1, 2, 3, 4, 7, 24])
def test_the_distribution_function_is_the_integral_of_the_density(nu: int) -> None:
    constant = math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
    n, t = 4000, 2.5
    grid = [constant * (1 + (i * t / n) ** 2 / nu) ** (-(nu + 1) / 2) for i in range(n + 1)]
    simpson = t / n / 3 * (grid[0] + grid[-1] + 4 * sum(grid[1:-1:2]) + 2 * sum(grid[2:-1:2]))
    assert t_cdf(t, nu) == pytest.approx(0.5 + simpson, abs=1e-10)


def test_a_sample() -> None:
    assert sample([1.0, 2.0, 6.0]) == {"n": 3, "mean": 3.0, "sd": pytest.approx(math.sqrt(7)), "min": 1.0, "max": 6.0}
    assert sample([1.5]) == {"n": 1, "mean": 1.5, "sd": None, "min": 1.5, "max": 1.5}
    assert sample([])["mean"] is None


def test_pairs_are_of_common_seeds() -> None:
    assert paired({1: 3.0, 2: 5.0, 4: 1.0}, {2: 4.0, 1: 1.0, 3: 9.0}) == {1: 2.0, 2: 1.0}


def test_an_interval_by_hand() -> None:
    # d = 1, 2, 3: mean 2, sd 1, n 3; t(2; 0.975) = 4.30265 for one comparison, t(2; 0.9875) = 6.20535 for two.
    assert interval([1.0, 2.0, 3.0], 1) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5)
    assert interval([1.0, 2.0, 3.0], 2) == pytest.approx((2 - 6.20535 / 3**0.5, 2 + 6.20535 / 3**0.5), rel=1e-5)


def test_intervals_hold_all_at_once_as_often_as_they_say() -> None:
    """Three methods that differ by nothing from the baseline they share: one study in twenty claims something."""
    random.seed(3)
    wrong, studies = 0, 1500
    for _ in range(studies):
        base = [random.gauss(0, 1) for _ in range(4)]
        others = [[random.gauss(0, 1) for _ in range(4)] for _ in range(3)]
        ends = [interval([x - b for x, b in zip(other, base, strict=True)], 3) for other in others]
        wrong += any(low > 0 or high < 0 for low, high in ends)
    assert 0.02 < wrong / studies < 0.065


def verdicts(*choices: dict[str, Any], seeds: int = 3) -> dict[str, str]:
    found = compare(record(list(choices), list(range(1, seeds + 1))))
    return {about["label"]: about["verdict"] for about in found}


BASE = choice("adamw", [4.86, 4.88, 4.85])


def test_verdicts_of_intervals() -> None:
    assert verdicts(
        BASE,
        choice("below", [4.60, 4.63, 4.61]),
        choice("above", [5.10, 5.13, 5.11]),
        choice("near", [4.80, 4.95, 4.84]),
    ) == {"adamw": "baseline", "below": "lower", "above": "higher", "near": "no difference shown"}


def test_what_allows_no_claim() -> None:
    assert verdicts(choice("adamw", [4.86]), choice("a", [4.5]), seeds=1)["a"] == "one seed: no claim"
    assert verdicts(choice("adamw", [4.5, 4.5]), choice("a", [4.25, 4.25]))["a"] == "seeds without effect: no claim"
    right = [5 / 24, 6 / 24], [6 / 24, 7 / 24]  # of 24 examples one more in both seeds, but for rounding
    assert right[1][0] - right[0][0] != right[1][1] - right[0][1]
    assert verdicts(choice("adamw", right[0]), choice("a", right[1]))["a"] == "seeds without effect: no claim"
    assert verdicts(BASE, choice("a", [4.5, 4.52, 4.51], comparable="else"))["a"] == "not comparable"
    assert verdicts(BASE, choice("a", [4.5, 4.53, None]))["a"] == "failed seeds: no claim"
    assert verdicts(BASE, choice("a", [None, None, None]))["a"] == "failed"
    assert verdicts(BASE, choice("a", [], status="failed", error="no memory"))["a"] == "failed"
    assert verdicts(BASE, choice("a", [], status="partial"))["a"] == "not finished"
    assert verdicts(BASE, choice("a", [], runs=[run(4.5, 7), run(4.6, 8)]))["a"] == "no common seed"
    assert verdicts(choice("adamw", [None]), choice("a", [4.5]))["a"] == "no baseline"
    assert verdicts(choice("a", [4.5, 4.6]))["a"] == "no baseline"


def test_comparability_has_to_be_known() -> None:
    assert verdicts({**BASE, "comparable": ""}, choice("a", [4.5, 4.52, 4.51], comparable=""))["a"] == "not comparable"


def test_a_baseline_that_lost_seeds_is_not_called_better() -> None:
    base = choice("adamw", [4.86, 4.88, None])
    found = verdicts(base, choice("above", [5.1, 5.121, 5.11]), choice("below", [4.6, 4.621, 4.61]))
    assert found["above"] == "failed seeds: no claim"
    assert found["below"] == "lower"


def test_intervals_share_the_error_among_those_that_were_made() -> None:
    """A choice that failed or cannot be compared costs the others nothing."""
    losses = [4.60, 4.63, 4.61]
    one = compare(record([BASE, choice("a", losses)], [1, 2, 3]))[1]["difference"]
    idle = [choice("b", [None, None, None]), choice("c", losses, comparable="else")]
    assert compare(record([BASE, choice("a", losses), *idle], [1, 2, 3]))[1]["difference"] == one
    two = compare(record([BASE, choice("a", losses), choice("d", [4.7, 4.8, 4.9])], [1, 2, 3]))[1]["difference"]
    t1, t2 = 4.302653, 6.205347
    assert (two["high"] - two["low"]) / (one["high"] - one["low"]) == pytest.approx(t2 / t1, rel=1e-6)
    assert one["mean"] == pytest.approx(statistics.fmean([-0.26, -0.25, -0.24]))


def test_seeds_are_counted() -> None:
    made = choice("a", [], runs=[run(4.5, 1), run(None, 2, status="failed"), run(None, 3, status="interrupted")])
    about = compare(record([BASE, made], [1, 2, 3, 4]))[1]
    assert about["seeds"] == {"planned": 4, "done": 1, "failed": 1, "unfinished": 2}


def test_a_loss_that_is_not_finite_is_lost() -> None:
    assert outcome(run(math.inf)) == "lost"
    assert outcome({**run(4.5), "loss": None}) == "lost"
    assert outcome(run(4.5)) == "done"


def test_trials_are_no_final_runs_and_a_repeated_seed_counts_once() -> None:
    made = choice("a", [], runs=[run(1.0, 1, "trial"), run(None, 1), run(4.5, 1), run(4.6, 2)])
    assert final_losses(made) == {1: 4.5, 2: 4.6}
