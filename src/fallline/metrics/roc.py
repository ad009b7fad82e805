"""How well a score tells positives from negatives: ROC, the area below it, and the true positives at few false ones.

A score is high for what is taken for a positive. Shapes: m positives, n negatives.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def curve(score: Floats, positive: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """The ROC as its corners, from (0, 0) to (1, 1). Equal scores are one step: no threshold parts them.

    Args:
        score: [N]. positive: [N].

    Returns:
        False and true positive rates, both rising.
    """
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)  # of each group of equal scores
    true = np.append(0, np.cumsum(positive[order])[last])
    false = np.append(0, np.cumsum(~positive[order])[last])
    bend = np.diff(true[1:]) * np.diff(false[:-1]) != np.diff(true[:-1]) * np.diff(false[1:])
    corner = np.concatenate(([True], bend, [True]))
    return false[corner] / false[-1], true[corner] / true[-1]


def auc(score: Floats, positive: NDArray[np.bool_]) -> Estimate:
    """The area below the ROC: how often a positive scores above a negative, half of the ties counted.

        AUC = mean_i V_i = mean_j U_j,   V_i = share of negatives below positive i,   U_j = share of positives above j
        AUC ± z · √(var(V) / m + var(U) / n)

    Near an area of 0 or 1 that interval is too narrow, and there it has no width. So it reaches at least to 0.025^(1/k)
    below and 1 − 0.025^(1/k) above: the exact interval of k = min(m, n) pairs of a positive and a negative with nothing
    in common, all of them ordered alike. That is chosen here, on the side of caution.

    Args:
        score: [N]. positive: [N], at least two of each.

    Source: DeLong, DeLong and Clarke-Pearson, Comparing the Areas under Two or More Correlated Receiver Operating
    Characteristic Curves, 1988; by ranks as in Sun and Xu, Fast Implementation of DeLong's Algorithm, 2014. For the
    ends: Clopper and Pearson, see `clopper_pearson`.
    """
    high, low = score[positive], score[~positive]
    below = _below(high, low)
    above = 1 - _below(low, high)
    area = float(below.mean())
    end = ((1 - LEVEL) / 2) ** (1 / min(len(high), len(low)))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    half = z * math.sqrt(below.var(ddof=1) / len(high) + above.var(ddof=1) / len(low))
    return Estimate(area, max(0.0, min(area - half, end)), min(1.0, max(area + half, 1 - end)))


def tpr_at(score: Floats, positive: NDArray[np.bool_], fpr: float) -> Estimate:
    """The largest true positive rate of a threshold whose false positive rate is at most `fpr`.

    The interval is Clopper and Pearson's for that threshold; that the threshold was chosen on these negatives is not in
    it. With fewer than 1 / fpr negatives, not a single false positive is allowed.

    Args:
        score: [N]. positive: [N]. fpr: 0 … 1.
    """
    high, low = score[positive], np.sort(score[~positive])
    allowed = math.floor(fpr * len(low) + 1e-9)  # 0.01 · 100 is a little less than 1 in some roundings
    hits = len(high) if allowed >= len(low) else int((high > low[len(low) - 1 - allowed]).sum())
    return Estimate(hits / len(high), *clopper_pearson(hits, len(high)))


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """The exact 95 % interval of a probability.

    Its ends are the p at which so many hits or more, and so many or fewer, have a probability of 0.025.

    Source: Clopper and Pearson, The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial, 1934.
    """
    return 1 - _upper(trials - hits, trials), _upper(hits, trials)


def _upper(hits: int, trials: int) -> float:
    """The p at which P(X ≤ hits) = 0.025, by bisection."""
    if hits == trials:
        return 1.0
    log = np.append(0.0, np.cumsum(np.log(np.arange(1, trials + 1))))  # of factorials
    k = np.arange(hits + 1)
    ways = log[trials] - log[k] - log[trials - k]
    low, high = 0.0, 1.0
    while low < (p := (low + high) / 2) < high:
        below = np.exp(ways + k * math.log(p) + (trials - k) * math.log1p(-p)).sum()
        low, high = (p, high) if below > (1 - LEVEL) / 2 else (low, p)
    return high


def _below(of: Floats, others: Floats) -> Any:
    """[of], the share of `others` below each, half of the equal ones counted."""
    others = np.sort(others)
    return (np.searchsorted(others, of, "left") + np.searchsorted(others, of, "right")) / (2 * len(others))
