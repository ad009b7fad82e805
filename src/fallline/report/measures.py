"""What was measured beside the loss, with its differences from the baseline.

Each measure is a family of its own: its intervals, one for each choice beside the baseline, hold all at once with 95 %.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import figures
from .statistics import finals, informative, interval, outcome, paired, sample


def measured(record: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the measures, and for each choice name → {n, mean, sd, min, max, difference, text, path}.

    `difference` {mean, low, high} is to the baseline, None without a common seed or where the measures are of other
    data; its bounds are None without two seeds that differ, and where a seed of either failed: what the others say is
    not of it, and of a measure nobody knows here which side is the better. `path` is the mean over seeds at the steps
    all evaluated.
    """
    choices = record["choices"]
    base = next((c for c in choices if c["label"] == record["baseline"]), None)
    names = list(dict.fromkeys(name for c in choices for run in done(c) for name in run.get("measures") or {}))
    found: list[dict[str, Any]] = [{} for _ in choices]
    for name in names:
        of_base = {} if base is None else at_the_end(base, name)
        pairs = [
            {} if base is None or c is base or not alike(c, base) else paired(at_the_end(c, name), of_base)
            for c in choices
        ]
        base_whole = base is not None and whole(base, name)
        told = [informative(p) and base_whole and whole(c, name) for c, p in zip(choices, pairs, strict=True)]
        made = sum(told)
        for choice, about, pair, claims in zip(choices, found, pairs, told, strict=True):
            values = at_the_end(choice, name)
            if not values:
                continue
            low, high = interval(list(pair.values()), made) if claims else (None, None)
            mean = statistics.fmean(pair.values()) if pair else None
            of = sample(list(values.values()))
            text = {
                "value": figures.loss(of["mean"], of["sd"]),
                "difference": "" if mean is None else figures.difference(mean, low, high),
            }
            difference = None if mean is None else {"mean": mean, "low": low, "high": high}
            about[name] = of | {"difference": difference, "text": text, "path": path(choice, name)}
    return names, found


def sentences(baseline: str, names: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """One sentence a measure, that claims no more than its intervals allow; `rows` are label and measures."""
    said = []
    for name in names:
        told = [(label, of[name]) for label, of in rows if name in of]
        groups: dict[str, list[str]] = {"lower": [], "higher": []}
        for label, of in told:
            low, high = (of["difference"] or {}).get("low"), (of["difference"] or {}).get("high")
            if low is not None and high is not None and (high < 0 or low > 0):
                groups["lower" if high < 0 else "higher"].append(f"{label} {of['text']['difference']}")
        claims = [f"{word} for {'; '.join(which)}" for word, which in groups.items() if which]
        base = next((of["text"]["value"] for label, of in told if label == baseline), None)
        claimed = f"{', '.join(claims)}" if claims else "no difference shown for any choice"
        said.append(f"{name}: {'' if base is None else f'{baseline} {base}; '}{claimed}.")
    return said


def done(choice: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs that count and ended well."""
    return [run for run in finals(choice).values() if outcome(run) == "done"]


def whole(choice: Mapping[str, Any], name: str) -> bool:
    """Whether no run failed, and none that is through lacks the measure."""
    ended = [run for run in finals(choice).values() if outcome(run) in ("done", "failed", "lost")]
    return len(at_the_end(choice, name)) == len(ended)


def at_the_end(choice: Mapping[str, Any], name: str) -> dict[int, float]:
    """Seed → the measure at the end."""
    values = {run["seed"]: (run.get("measures") or {}).get(name) for run in done(choice)}
    return {seed: value for seed, value in values.items() if value is not None}


def path(choice: Mapping[str, Any], name: str) -> list[float | None]:
    """The mean over seeds at each step that all of them evaluated."""
    curves = [run["curve"] for run in done(choice) if name in ((run.get("curve") or {}).get("measures") or {})]
    if not curves:
        return []
    by_step = [dict(zip(c["step"], c["measures"][name], strict=True)) for c in curves]
    steps = sorted(set.intersection(*(set(at) for at in by_step)))
    rows = [[at[step] for at in by_step] for step in steps]
    return [statistics.fmean(row) if None not in row else None for row in rows]


def alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether measures of two choices are known to be of the same rows, cut into the same tokens."""
    return bool(a.get("measured_on")) and a.get("measured_on") == b.get("measured_on")
