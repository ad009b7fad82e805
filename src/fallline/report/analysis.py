"""From a record to what its report says: statistics, curves over seeds, numbers as text, and the sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import figures
from .measures import measured
from .statistics import ALPHA, NOT_COMPARABLE, compare, finals, outcome
from .summary import has_ratio, summary

#: Choices beside the baseline whose curves are drawn at first.
SHOWN = 8


def analyse(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with an ``analysis``; numbers that JSON does not have become None. An analysed record can be given.

    Returns:
        The record and ``analysis``: {``choices``: in the record's order, see `statistics.compare`, with ``curve``, the
        mean and range over seeds, and ``text``, the numbers as shown; ``order``: indices of choices, the baseline
        first, then by mean loss; ``shown``: those whose curves are drawn at first; ``intervals`` and ``level``: how
        many intervals hold at once and how probable each is; ``measures``: names, see `measures.measured`;
        ``trade_off``: the two of them to draw against each other, or None; ``summary``: sentences by subject}.
    """
    analysed: dict[str, Any] = _finite(record)
    choices = compare(analysed)
    baseline = _baseline(analysed)
    names, measures = measured(analysed)
    for choice, about, of_choice in zip(analysed["choices"], choices, measures, strict=True):
        about["measures"] = of_choice
        about["curve"] = curve(choice)
        about["text"] = _text(choice, about, baseline)
    intervals = sum(1 for c in choices if c["difference"] and c["difference"]["low"] is not None)
    order = _order(choices, analysed["baseline"])
    analysed["analysis"] = {
        "choices": choices,
        "order": order,
        "shown": [i for i in order if choices[i]["verdict"] != NOT_COMPARABLE][: SHOWN + 1],
        "intervals": intervals,
        "level": 1 - ALPHA / intervals if intervals else None,
        "measures": names,
        "trade_off": _axes(analysed, names),
    }
    analysed["analysis"]["summary"] = summary(analysed)
    return analysed


def curve(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    """Mean, least and greatest validation loss over the seeds that ended well, at the steps all of them evaluated.

    Returns:
        ``step``, ``tokens`` and ``seconds`` (step × measured step time) where known, ``mean``, ``low``, ``high``: lists
        of one length, None where a seed's loss is not finite; and ``seeds``, how many. None without such a run.
    """
    runs = [run for run in finals(choice).values() if outcome(run) == "done" and (run.get("curve") or {}).get("step")]
    if not runs:
        return None
    losses = [dict(zip(run["curve"]["step"], run["curve"]["val_loss"], strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(at) for at in losses)))
    rows = [[at[step] for at in losses] for step in steps]
    first = runs[0]["curve"]
    tokens = dict(zip(first["step"], first["tokens"], strict=True)) if first.get("tokens") else None
    time = choice.get("time")
    return {
        "step": steps,
        "tokens": [tokens[step] for step in steps] if tokens else None,
        "seconds": [step * time["step"] for step in steps] if time and not time.get("void") else None,
        "mean": [statistics.fmean(row) if None not in row else None for row in rows],
        "low": [min(row) if None not in row else None for row in rows],
        "high": [max(row) if None not in row else None for row in rows],
        "seeds": len(runs),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _baseline(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((c for c in record["choices"] if c["label"] == record["baseline"]), {})


def _axes(record: Mapping[str, Any], names: Sequence[str]) -> list[str] | None:
    """What the first choice's objective declares, where it was measured; else the first measure and the last."""
    for choice in record["choices"]:
        both = choice.get("trade_off")
        if both and set(both) <= set(names):
            return [*both]
    return [names[0], names[-1]] if len(names) > 1 else None


def _order(choices: Sequence[Mapping[str, Any]], baseline: str) -> list[int]:
    def key(i: int) -> tuple[bool, bool, bool, float]:
        c = choices[i]
        mean = c["loss"]["mean"]
        return (c["label"] != baseline, mean is None, c["verdict"] == NOT_COMPARABLE, mean or 0.0)

    return sorted(range(len(choices)), key=key)


def _text(choice: Mapping[str, Any], about: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, str]:
    loss, difference, seeds = about["loss"], about["difference"], about["seeds"]
    part = f" ({seeds['done']}/{seeds['planned']})" if seeds["done"] < seeds["planned"] else ""
    text = {
        "loss": f"{figures.loss(loss['mean'], loss['sd'])}{part}" if loss["n"] else "",
        "difference": (
            figures.difference(difference["mean"], difference["low"], difference["high"]) if difference else ""
        ),
        "tuned": figures.value((choice.get("tuned") or {}).get("value")),
    }
    memory = choice.get("memory")
    if memory:
        parts = ("peak", "weights", "gradients", "optimizer", "rest")
        text |= {part: figures.size(memory[part]) for part in parts if memory.get(part) is not None}
    time = choice.get("time")
    if time and time.get("void"):
        text |= {"step": "void", "ratio": "void"}
    elif time:
        text["step"] = figures.milliseconds(time["step"])
        if time.get("spread") is not None:
            text["step_spread"] = figures.percent(time["spread"])
        if has_ratio(choice, baseline):
            text["ratio"] = figures.fixed(time["ratio"], 2)
            if time.get("ratio_spread") is not None:
                text["ratio_spread"] = figures.percent(time["ratio_spread"])
        text |= {f"phase {phase}": figures.milliseconds(s) for phase, s in (time.get("phases") or {}).items() if s}
    return text
