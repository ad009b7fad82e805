"""How sure a share of n trials is."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

LEVEL = 0.95


class Share(NamedTuple):
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(hits: int, trials: int) -> Share:
    """The share of hits with Wilson's interval, which keeps its width near 0 and 1.

        (p̂ + z²/2n ± z √(p̂ (1 − p̂)/n + z²/4n²)) / (1 + z²/n)

    Args:
        hits: of `trials`, which are at least one.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.

    >>> [round(value, 3) for value in wilson(8, 10)]
    [0.8, 0.49, 0.943]
    """
    share, z = hits / trials, NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    whole = 1 + z * z / trials
    # rounding must not put an end on the wrong side of the share itself
    return Share(share, min(share, max(0.0, (middle - half) / whole)), max(share, min(1.0, (middle + half) / whole)))
