"""Differences between choices over common seeds, with intervals that hold all at once.

For a choice c and the baseline b, with final losses x over the seeds s that both finished:

    d_s = x_c,s − x_b,s        d̄ ± t_{ν, 1 − α/2k} · sd(d) / √n        ν = n − 1

k is the number of intervals of the report and α = 0.05, so that by Bonferroni's inequality all k hold at once with a
probability of at least 95 %, however they depend on each other through the common baseline.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ALPHA = 0.05

BASELINE = "baseline"
LOWER = "lower"
HIGHER = "higher"
NONE_SHOWN = "no difference shown"
ONE_SEED = "one seed: no claim"
SAME_RUNS = "seeds without effect: no claim"
SEEDS_FAILED = "failed seeds: no claim"
NO_COMMON_SEED = "no common seed"
NO_BASELINE = "no baseline"
NOT_COMPARABLE = "not comparable"
NOT_FINISHED = "not finished"
FAILED = "failed"


def t_cdf(t: float, nu: int) -> float:
    """Student's t distribution function for a whole number of degrees of freedom.

    With θ = arctan(t/√ν), P(T ≤ t) = ½ + A/2, where

        ν even:  A = sin θ (1 + ½ cos²θ + (1·3)/(2·4) cos⁴θ + … up to cos^{ν−2} θ)
        ν odd:   A = 2/π (θ + sin θ (cos θ + ⅔ cos³θ + (2·4)/(3·5) cos⁵θ + … up to cos^{ν−2} θ))

    Args:
        t: where. nu: degrees of freedom, at least 1.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    theta = math.atan(t / math.sqrt(nu))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = nu % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, nu - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine * cosine
    area = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return 0.5 + area / 2


def t_quantile(p: float, nu: int) -> float:
    """The t with P(T ≤ t) = p, by bisection.

    Args:
        p: probability, 0.5 ≤ p < 1. nu: degrees of freedom, at least 1.
    """
    high = 1.0
    while t_cdf(high, nu) < p:
        high *= 2
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_cdf(middle, nu) < p else (low, middle)
    return high


def finals(choice: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Seed → the choice's final run."""
    return {run["seed"]: run for run in choice.get("runs") or () if run["kind"] == "final"}


def outcome(run: Mapping[str, Any]) -> str:
    """`done`, `interrupted`, `failed`, or `lost` where it says so or its loss is not a finite number."""
    if run["status"] != "done":
        return str(run["status"])
    loss = run.get("loss")
    return "done" if loss is not None and math.isfinite(loss) else "lost"


def final_losses(choice: Mapping[str, Any]) -> dict[int, float]:
    """Seed → final validation loss, of the runs that ended well."""
    return {seed: run["loss"] for seed, run in finals(choice).items() if outcome(run) == "done"}


def sample(values: Sequence[float]) -> dict[str, Any]:
    """n, mean, sample standard deviation (None for fewer than two), least and greatest value."""
    return {
        "n": len(values),
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
    }


def paired(losses: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """Seed → loss minus the baseline's, over the seeds of both."""
    return {seed: losses[seed] - baseline[seed] for seed in sorted(losses.keys() & baseline.keys())}


def interval(differences: Sequence[float], comparisons: int) -> tuple[float, float]:
    """The interval of the mean of at least two differences, one of `comparisons` that hold all at once."""
    n = len(differences)
    t = t_quantile(1 - ALPHA / (2 * comparisons), n - 1)
    half = t * statistics.stdev(differences) / math.sqrt(n)
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def compare(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Statistics and a verdict for each choice of a record, in its order.

    Returns:
        Of each choice: ``loss`` (see `sample`), ``seeds`` {planned, done, failed, unfinished}, ``difference`` {n, mean,
        low, high, pairs} to the baseline, None without a common seed, its bounds None without a claim to make, and
        ``verdict``.
    """
    choices = record["choices"]
    base = next((c for c in choices if c["label"] == record["baseline"]), None)
    base_losses = final_losses(base) if base else {}
    planned = len(record.get("seeds") or ())
    seeds = [_seeds(choice, choice.get("planned", planned)) for choice in choices]
    base_failed = any(s["failed"] for s, c in zip(seeds, choices, strict=True) if c is base)
    pairs = [
        paired(final_losses(c), base_losses) if base and c is not base and comparable(c, base) else {} for c in choices
    ]
    made = sum(1 for p in pairs if informative(p))
    found = []
    for choice, counts, pair in zip(choices, seeds, pairs, strict=True):
        losses = final_losses(choice)
        low, high = interval(list(pair.values()), made) if informative(pair) else (None, None)
        if not losses:
            verdict = FAILED if counts["failed"] or choice["status"] == "failed" else NOT_FINISHED
        elif choice is base:
            verdict = BASELINE
        elif not base_losses:
            verdict = NO_BASELINE
        elif not comparable(choice, base or {}):
            verdict = NOT_COMPARABLE
        else:
            verdict = _verdict(pair, low, high, counts["failed"] > 0, base_failed)
        found.append(
            {
                "label": choice["label"],
                "loss": sample(list(losses.values())),
                "seeds": counts,
                "difference": _difference(pair, low, high) if pair else None,
                "verdict": verdict,
            }
        )
    return found


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether losses of two choices are known to be of the same rows, cut into the same tokens."""
    return bool(a.get("comparable")) and a.get("comparable") == b.get("comparable")


def informative(pairs: Mapping[int, float]) -> bool:
    """Whether differences say anything of their own spread: there are two, and seeds change them by more than rounding,
    as where a measure counts examples and the same number more are right."""
    found = pairs.values()
    return len(found) > 1 and (max(found) - min(found) > ROUNDING * max(map(abs, found)) or not any(found))


ROUNDING = 1e-9
"""Of a difference, what its arithmetic may be off by."""


def _seeds(choice: Mapping[str, Any], planned: int) -> dict[str, int]:
    ends = [outcome(run) for run in finals(choice).values()]
    done, failed = ends.count("done"), ends.count("failed") + ends.count("lost")
    planned = max(planned, len(ends))
    return {"planned": planned, "done": done, "failed": failed, "unfinished": planned - done - failed}


def _difference(pairs: Mapping[int, float], low: float | None, high: float | None) -> dict[str, Any]:
    return {
        "n": len(pairs),
        "mean": statistics.fmean(pairs.values()),
        "low": low,
        "high": high,
        "pairs": {str(seed): value for seed, value in pairs.items()},
    }


def _verdict(pairs: Mapping[int, float], low: float | None, high: float | None, failed: bool, base_failed: bool) -> str:
    if not pairs:
        return NO_COMMON_SEED
    if low is None or high is None:
        return ONE_SEED if len(pairs) == 1 else SAME_RUNS
    # The losses of the seeds that came through say nothing of those that did not.
    if high < 0:
        return SEEDS_FAILED if failed else LOWER
    if low > 0:
        return SEEDS_FAILED if base_failed else HIGHER
    return SEEDS_FAILED if failed or base_failed else NONE_SHOWN
