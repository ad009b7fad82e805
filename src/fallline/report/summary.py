"""What a comparison found, in sentences that claim no more than its intervals allow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import figures
from .measures import sentences
from .statistics import (
    ALPHA,
    FAILED,
    HIGHER,
    LOWER,
    NO_BASELINE,
    NO_COMMON_SEED,
    NONE_SHOWN,
    NOT_COMPARABLE,
    NOT_FINISHED,
    ONE_SEED,
    SAME_RUNS,
    SEEDS_FAILED,
    finals,
    outcome,
)

UNTUNED = (
    "Learning rates were not tuned here: each choice ran at its recipe's or default rate, so a difference may be "
    "one of rates, not of methods."
)

#: Choices that one sentence lists.
LISTED = 9

Rows = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def summary(analysed: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sentences by subject: ``answer``, ``measures``, ``memory``, ``time``, ``caveats``; in that order."""
    analysis = analysed["analysis"]
    rows = [(analysed["choices"][i], analysis["choices"][i]) for i in analysis["order"]]
    return {
        "answer": _answer(analysed, rows),
        "measures": _measures(analysed, rows),
        "memory": _memory(analysed, rows),
        "time": _time(analysed, rows),
        "caveats": [
            *_held_equal(analysed),
            *_tuning(analysed, rows),
            *_scope(analysed),
            *(analysed.get("notes") or ()),
        ],
    }


def has_ratio(choice: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """Whether the choice's step time by the baseline's is a result: both were measured and neither is void."""
    time, base = choice.get("time"), baseline.get("time")
    if not time or not base or choice is baseline:
        return False
    return not time.get("void") and not base.get("void") and time.get("ratio") is not None


def _answer(analysed: Mapping[str, Any], rows: Rows) -> list[str]:
    baseline, analysis = analysed["baseline"], analysed["analysis"]
    of = {v: [about for _, about in rows if about["verdict"] == v] for v in {about["verdict"] for _, about in rows}}
    said = []
    if not any(about["loss"]["n"] for _, about in rows):
        said.append("No choice finished, so there is nothing to compare.")
    elif NO_BASELINE in of:
        said.append(f"The baseline {baseline} has no final loss, so no differences were computed.")
    for verdict in (LOWER, HIGHER):
        if verdict in of:
            said.append(_claim(of[verdict], f"ended with a {verdict} validation loss than {baseline}"))
    if NONE_SHOWN in of:
        said.append(
            f"No difference from {baseline} was shown for {_differences(of[NONE_SHOWN])}; that does not show that "
            "there is none."
        )
    if ONE_SEED in of:
        base = [about for _, about in rows if about["label"] == baseline]
        said.append(
            f"One seed, so no claim is made: the final validation losses are {_losses([*base, *of[ONE_SEED]])}, and "
            "another seed may order them differently."
        )
    if SAME_RUNS in of:
        said.append(
            f"Seeds changed nothing in the difference of {_differences(of[SAME_RUNS])} from {baseline}: these are as "
            "good as one run, and no claim is made."
        )
    if NO_COMMON_SEED in of:
        said.append(f"{_names(of[NO_COMMON_SEED])} and {baseline} finished no common seed, so no claim is made.")
    if NOT_COMPARABLE in of:
        said.append(
            f"The losses of {_names(of[NOT_COMPARABLE])} cannot be compared with {baseline}'s: the data, the "
            "tokenizer, the evaluation rows or the objective are not the same."
        )
    for choice, about in rows:
        said += _lost_seeds(choice, about)
    said += _failures(rows)
    if analysis["intervals"]:
        said.append(_meaning(analysed))
    return said


def _measures(analysed: Mapping[str, Any], rows: Rows) -> list[str]:
    names = analysed["analysis"]["measures"]
    if not names:
        return []
    of = [(about["label"], about["measures"]) for _, about in rows]
    said = sentences(analysed["baseline"], names, of)
    intervals = any((m["difference"] or {}).get("low") is not None for _, found in of for m in found.values())
    if intervals:
        said.append(
            f"Differences from {analysed['baseline']}; the intervals of each measure hold all at once with "
            f"{100 * (1 - ALPHA):g} %, those of several measures together do not."
        )
    return said


def _claim(items: Sequence[Mapping[str, Any]], claim: str) -> str:
    if len(items) == 1:
        return f"{items[0]['label']} {claim}: {items[0]['text']['difference']}."
    return f"These {claim}: {_differences(items)}."


def _meaning(analysed: Mapping[str, Any]) -> str:
    analysis = analysed["analysis"]
    made = [c for c in analysis["choices"] if c["difference"] and c["difference"]["low"] is not None]
    seeds = sorted({c["difference"]["n"] for c in made})
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    if len(made) == 1:
        holds = f"The interval in brackets holds with {100 * (1 - ALPHA):g} % confidence"
    else:
        holds = (
            f"The {len(made)} intervals in brackets hold all at once with {100 * (1 - ALPHA):g} % confidence (each "
            f"with {100 * analysis['level']:.4g} %)"
        )
    return (
        f"{holds}; they are t intervals of the differences from {analysed['baseline']} over {n} common seeds, and "
        "assume that these vary normally from seed to seed. Other pairs of choices were not tested."
    )


def _lost_seeds(choice: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    seeds = about["seeds"]
    if not about["loss"]["n"]:
        return []
    said = []
    if seeds["failed"]:
        ends = [outcome(run) for run in finals(choice).values()]
        how = "diverged" if "failed" not in ends else "diverged or failed" if "lost" in ends else "failed"
        claim = "its mean is of the others"
        if about["verdict"] == SEEDS_FAILED:
            claim += ", and no claim is made"
        errors = [run["error"] for run in finals(choice).values() if outcome(run) != "done" and run.get("error")]
        reason = f" ({errors[0].rstrip('.')})" if errors else ""
        said.append(
            f"{about['label']}: {seeds['failed']} of {figures.count(seeds['planned'], 'seed')} {how}{reason}; {claim}."
        )
    elif about["verdict"] == SEEDS_FAILED:
        said.append(f"{about['label']}: no claim is made, because seeds of the baseline diverged or failed.")
    if seeds["unfinished"]:
        said.append(
            f"{about['label']}: {seeds['unfinished']} of {figures.count(seeds['planned'], 'seed')} did not finish."
        )
    return said


def _failures(rows: Rows) -> list[str]:
    said = []
    for choice, about in rows:
        errors = [run["error"] for run in finals(choice).values() if run.get("error")]
        reason = choice.get("error") or (errors[0] if errors else None)
        if about["verdict"] == FAILED:
            ends = [outcome(run) for run in finals(choice).values()]
            how = (
                "failed"
                if not ends or "failed" in ends
                else f"diverged with each of its {figures.count(len(ends), 'seed')}"
            )
            said.append(f"{about['label']} {how}{f': {_stop(reason)}' if reason else '.'}")
        elif about["verdict"] == NOT_FINISHED:
            said.append(f"{about['label']} did not finish{f': {_stop(reason)}' if reason else '.'}")
        elif choice.get("error"):
            said.append(f"{about['label']}: {_stop(choice['error'])}")
    return said


def _memory(analysed: Mapping[str, Any], rows: Rows) -> list[str]:
    measured = [(c, a) for c, a in rows if c.get("memory")]
    if not measured:
        return ["Memory was not measured."]
    base = next((c["memory"] for c, _ in measured if c["label"] == analysed["baseline"]), None)
    kinds = {c["memory"]["kind"] for c, _ in measured}
    said = []

    def words(choice: Mapping[str, Any]) -> str:
        memory = choice["memory"]
        text = f"{choice['label']} {figures.size(memory['peak'])}"
        if base and memory is not base and base["peak"] > 0 and base["kind"] == memory["kind"]:
            text += f", {figures.fixed(memory['peak'] / base['peak'], 2)} times {analysed['baseline']}'s"
        if memory.get("optimizer") is not None:
            text += f" (optimizer state {figures.size(memory['optimizer'])})"
        return text

    how = {"resident": "the process's resident memory above its state after import", "allocated": "allocated by torch"}
    for kind in sorted(kinds):
        listed = [words(c) for c, _ in measured if c["memory"]["kind"] == kind]
        said.append(f"Peak memory, {how.get(kind, kind)}: {_some(listed)}.")
    if len(kinds) > 1:
        said.append("Peaks measured in different ways cannot be compared.")
    trained = [f"{c['label']} {c['trained'] / 1e6:.3g} M" for c, _ in rows if c.get("trained")]
    if len({c["trained"] for c, _ in rows if c.get("trained")}) > 1:
        said.append(f"Parameters that are trained: {_some(trained)}.")
    return said + _missing("Memory was not measured for", rows, "memory")


def _time(analysed: Mapping[str, Any], rows: Rows) -> list[str]:
    measured = [(c, a) for c, a in rows if c.get("time")]
    if not measured:
        return ["Step times were not measured."]
    base = next((c for c, _ in rows if c["label"] == analysed["baseline"]), {})
    good = [(c, a) for c, a in measured if not c["time"].get("void")]
    void = [a for c, a in measured if c["time"].get("void")]

    alone = [(c, a) for c, a in good if not has_ratio(c, base)]
    same = [(c, a) for c, a in good if has_ratio(c, base) and _within_spread(c["time"])]
    other = [(c, a) for c, a in good if has_ratio(c, base) and not _within_spread(c["time"])]
    said = []
    if alone:
        takes = (
            f"{c['label']}'s step takes {figures.milliseconds(c['time']['step'])}{_spread(c, 'spread')}"
            for c, _ in alone
        )
        said.append(f"{_some(list(takes))}.")
    if other:
        takes = (
            f"{c['label']}'s step takes {_ratio(c)} times {base['label']}'s{_spread(c, 'ratio_spread')}"
            for c, _ in other
        )
        said.append(f"{_some(list(takes))}.")
    if same:
        takes = (f"{c['label']} {_ratio(c)}{_spread(c, 'ratio_spread')}" for c, _ in same)
        said.append(f"No difference from {base['label']}'s step time beyond the spread: {_some(list(takes))}.")
    if any(c["time"].get("spread") is not None for c, _ in good):
        rounds = {c["time"].get("rounds") for c, _ in good} - {None}
        over = f"over {min(rounds)} rounds" if len(rounds) == 1 else "over rounds"
        said.append(f"Step times are medians and ± is the interquartile range {over}.")
    if void:
        said.append(f"The timing of {_names(void)} is void: it varied too much from round to round to be a result.")
    if (base.get("time") or {}).get("void") and good:
        said.append(f"Without a timing of {base['label']} no ratios are given.")
    apart = [a for c, a in good if c["time"].get("interleaved") is False]
    if apart:
        said.append(
            f"{_names(apart)} {'was' if len(apart) == 1 else 'were'} not timed in turns with the others, so other load "
            "on the machine may be part of a ratio."
        )
    return said + _missing("Step times were not measured for", rows, "time")


def _held_equal(analysed: Mapping[str, Any]) -> list[str]:
    equal = analysed.get("equal")
    if equal == "time":
        steps = ", ".join(f"{c['label']} {c['steps']}" for c in analysed["choices"] if c.get("steps"))
        said = [
            "Held equal: training seconds, as steps × measured step time, without evaluation and start-up; steps: "
            f"{steps}."
        ]
        void = [c for c in analysed["choices"] if (c.get("time") or {}).get("void")]
        if void:
            said.append(f"As the timing of {_names(void)} is void, these seconds are not known to be equal.")
        return said
    if equal == "memory":
        return ["Held equal: peak memory, by the number of rows in a step; tokens seen may differ."]
    return [f"Held equal: {equal}."] if equal else []


def _tuning(analysed: Mapping[str, Any], rows: Rows) -> list[str]:
    tune = analysed.get("tune")
    if not tune:
        without = [a for c, a in rows if not c.get("tuned") and a["loss"]["n"]]
        if len(without) == sum(1 for _, a in rows if a["loss"]["n"]):
            return [UNTUNED]
        return [f"{_names(without)} ran without tuning."] if without else []
    name = tune["key"]
    decades = f"{math.log10(tune['high'] / tune['low']):.2g}"
    said = [
        f"Tuned: {name}, with {tune['trials']} trials for each choice over {decades} "
        f"{'decade' if decades == '1' else 'decades'} ({figures.value(tune['low'])} to {figures.value(tune['high'])}), "
        f"on seed {tune['seed']}."
    ]
    other = [c for c, _ in rows if c.get("tuned") and c["tuned"].get("trials") not in (None, tune["trials"])]
    if other:
        listed = ", ".join(f"{c['label']} {c['tuned']['trials']} trials" for c in other)
        said.append(f"The range was widened, because the best value was on its edge: {listed}.")
    if tune.get("rule"):
        said.append(_stop(tune["rule"]))
    said.append(
        f"The intervals cover seeds and not the choice of {name}: another tuning may pick another value."
        if analysed["analysis"]["intervals"]
        else f"Another tuning may pick another value of {name}."
    )
    if tune["seed"] in (analysed.get("seeds") or ()):
        said.append(
            f"Seed {tune['seed']} both chose the values and is among the final seeds, which flatters all losses."
        )
    for choice, _ in rows:
        if (choice.get("tuned") or {}).get("edge"):
            said.append(
                f"{choice['label']}'s tuned {name}, {figures.value(choice['tuned']['value'])}, is on the edge of what "
                "was tried: its optimum may lie beyond, and its loss may be overstated."
            )
    untuned = [c for c, a in rows if not c.get("tuned") and a["loss"]["n"]]
    if untuned:
        said.append(f"{_names(untuned)} ran without tuning.")
    return said


def _scope(analysed: Mapping[str, Any]) -> list[str]:
    model, data = analysed.get("model") or {}, analysed.get("data") or {}
    size = f" ({model['parameters'] / 1e6:.3g} M parameters)" if model.get("parameters") else ""
    steps = sorted({c["steps"] for c in analysed["choices"] if c.get("steps")})
    span = f" ({steps[0]} steps)" if len(steps) == 1 else f" ({steps[0]} to {steps[-1]} steps)" if steps else ""
    name = f" ({data['name']})" if data.get("name") else ""
    return [f"This holds for this model{size}, this data{name} and this length{span} only."]


def _missing(text: str, rows: Rows, what: str) -> list[str]:
    missing = [about for choice, about in rows if not choice.get(what) and about["loss"]["n"]]
    return [f"{text} {_names(missing)}."] if missing else []


def _ratio(choice: Mapping[str, Any]) -> str:
    return figures.fixed(choice["time"]["ratio"], 2)


def _spread(choice: Mapping[str, Any], of: str) -> str:
    spread = choice["time"].get(of)
    return "" if spread is None else f" (± {figures.percent(spread)})"


def _within_spread(time: Mapping[str, Any]) -> bool:
    return abs(time["ratio"] - 1) <= time["ratio"] * (time.get("ratio_spread") or 0.0)


def _stop(sentence: str) -> str:
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def _names(items: Iterable[Mapping[str, Any]]) -> str:
    names = [item["label"] for item in items]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _differences(items: Sequence[Mapping[str, Any]]) -> str:
    return _some([f"{item['label']} {item['text']['difference']}" for item in items])


def _losses(items: Iterable[Mapping[str, Any]]) -> str:
    return _some([f"{item['label']} {item['text']['loss']}" for item in items])


def _some(parts: Sequence[str]) -> str:
    """The first few, which are the baseline and the choices of least loss; the table has all.

    >>> _some(["a 1", "b 2"])
    'a 1; b 2'
    >>> _some([*"abcdefghij"])  # to leave out one is to save nothing
    'a; b; c; d; e; f; g; h; i; j'
    """
    if len(parts) <= LISTED + 1:
        return "; ".join(parts)
    return f"{'; '.join(parts[:LISTED])}; the other {len(parts) - LISTED} are in the table"
