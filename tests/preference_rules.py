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


def ipo(p: P, tau: float = 0.1, average: bool = True) -> Answer:
    n_w, n_l = (p.n_w, p.n_l) if average else (1, 1)
    gap = 1 / (2 * tau) - (p.w - p.ref_w) / n_w + (p.l - p.ref_l) / n_l
    return {"pair": gap**2}, 2 * gap / n_w, 2 * gap / n_l


def simpo(p: P, beta: float = 2.0, gamma: float = 0.5) -> Answer:
    z = beta * (p.w / p.n_w - p.l / p.n_l) - gamma
    return {"pair": softplus(-z)}, beta / p.n_w * sigma(-z), beta / p.n_l * sigma(-z)


def cpo(p: P, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> Answer:
    terms, slope, _ = dpo(p._replace(ref_w=0, ref_l=0), beta, label_smoothing)
    return terms | {"nll": -alpha * p.w}, slope + alpha, slope


def orpo(p: P, weight: float = 0.1) -> Answer:
    a_w, a_l = p.w / p.n_w, p.l / p.n_l
    z = (a_w - math.log(-math.expm1(a_w))) - (a_l - math.log(-math.expm1(a_l)))
    d_w, d_l = (weight * sigma(-z) / -math.expm1(a) / n for a, n in ((a_w, p.n_w), (a_l, p.n_l)))
    return {"pair": weight * softplus(-z), "nll": -p.w}, 1 + d_w, d_l


def rdpo(p: P, beta: float = 0.1, alpha: float = 0.01) -> Answer:
    z = beta * p.delta + alpha * (p.n_w - p.n_l)
    return {"pair": softplus(-z)}, beta * sigma(-z), beta * sigma(-z)


def sppo(p: P, beta: float = 0.01) -> Answer:
    w, l = 1 / (2 * beta) - (p.w - p.ref_w), 1 / (2 * beta) + (p.l - p.ref_l)  # noqa: E741
    return {"chosen": w**2, "rejected": l**2}, 2 * w, 2 * l


def slic(p: P, delta: float = 1.0, anchor: float = 1.0) -> Answer:
    on = float(delta - p.w + p.l > 0)
    return {"pair": max(0.0, delta - p.w + p.l), "nll": -anchor * p.w}, on + anchor, on


def rrhf(p: P, weight: float = 1.0) -> Answer:
    a_w, a_l = p.w / p.n_w, p.l / p.n_l
    on = weight * (a_l > a_w)
    return {"pair": on * (a_l - a_w), "nll": -p.w}, on / p.n_w + 1, on / p.n_l


def dpop(p: P, beta: float = 0.1, weight: float = 50.0) -> Answer:
    fallen = p.ref_w > p.w
    z = beta * (p.delta - weight * fallen * (p.ref_w - p.w))
    return {"pair": softplus(-z)}, beta * sigma(-z) * (1 + weight * fallen), beta * sigma(-z)


def kto(p: P, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0, z: float = 0.0) -> Answer:
    w, l = sigma(beta * (p.w - p.ref_w - z)), sigma(beta * (z - p.l + p.ref_l))  # noqa: E741
    values = {"chosen": desirable * (1 - w) / 2, "rejected": undesirable * (1 - l) / 2}
    return values, desirable * beta * w * (1 - w) / 2, undesirable * beta * l * (1 - l) / 2


ROWS: dict[str, Row] = {
    "dpo": Row([{}, {"beta": 0.5}, {"label_smoothing": 0.2}], dpo),
    "ipo": Row([{}, {"tau": 0.5}, {"average": False}], ipo),
    "simpo": Row([{}, {"beta": 1.0, "gamma": 0.0}], simpo),
    "cpo": Row([{}, {"beta": 0.5, "alpha": 0.5, "label_smoothing": 0.2}], cpo),
    "orpo": Row([{}, {"weight": 1.0}], orpo),
    "rdpo": Row([{}, {"alpha": 0.3, "beta": 0.5}], rdpo),
    "sppo": Row([{}, {"beta": 0.5}], sppo),
    "slic": Row([{}, {"delta": 3.0, "anchor": 0.5}], slic),
    "rrhf": Row([{}, {"weight": 3.0}], rrhf),
    "kto": Row([{}, {"beta": 0.5, "desirable": 2.0, "undesirable": 0.5}], kto),
    "dpop": Row([{}, {"beta": 0.02, "weight": 2.0}], dpop),
}
