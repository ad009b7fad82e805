"""The margin family written from the papers' equations: values, and (d_w, d_l) = (−∂/∂logp_w, ∂/∂logp_l).

All in float64, one pair at a time and in plain arithmetic, so that nothing is shared with what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class P(NamedTuple):
    """A pair: log π and log π_ref of chosen and rejected, and how many labels each has."""

    w: float
    l: float  # noqa: E741
    ref_w: float
    ref_l: float
    n_w: int
    n_l: int

    @property
    def delta(self) -> float:
        return (self.w - self.ref_w) - (self.l - self.ref_l)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """−log σ(−x)."""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


Answer = tuple[dict[str, float], float, float]


class Row(NamedTuple):
    """One method.

    Attributes:
        options: that are tried; the first are the defaults.
        rule: pair, options → terms, d_w, d_l.
    """

    options: list[dict[str, Any]]
    rule: Callable[..., Answer]


def dpo(p: P, beta: float = 0.1, label_smoothing: float = 0.0) -> Answer:
    z, e = beta * p.delta, label_smoothing
    slope = beta * ((1 - e) * sigma(-z) - e * sigma(z))
    return {"pair": (1 - e) * softplus(-z) + e * softplus(z)}, slope, slope


ROWS: dict[str, Row] = {
    "dpo": Row([{}, {"beta": 0.5}, {"label_smoothing": 0.2}], dpo),
}
