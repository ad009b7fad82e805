"""From the folder of a comparison, or from runs that were made one by one, to the record that the report is made of."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import __version__
from ...metrics import read
from ...recipe import Recipe
from .choices import Choice
from .study import RunPlace, Study, finals_of, trials_of
from .tuning import RULE

Record = dict[str, Any]


def gather(folder: Path, study: Study) -> Record:
    """All that is known of a comparison so far.

    Args:
        folder: of the comparison. study: its question.
    """
    measured = {c.label: read_json(folder / "measured" / f"{c.folder}.json") for c in study.choices}
    records = [m["record"] for m in measured.values() if "record" in m]
    choices = [choice_record(folder, study, c, measured[c.label]) for c in study.choices]
    baseline = next((c for c in choices if c["status"] != "failed"), choices[0])
    set_times(choices, measured, baseline["label"])
    about: Record = records[0] if records else {}
    code, changed = sources(read_json(path) for path in sorted((folder / "runs").glob("*/*.json")))
    return {
        "format": 1,
        "fallline": __version__,
        "name": study.name,
        "command": study.command or None,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "equal": None if any("steps" in c.changes for c in study.choices) else study.equal,
        "baseline": baseline["label"],
        "seeds": [*study.seeds],
        "tune": tune_record(study),
        "machine": machine(about)
        | {"threads": next((m["threads"] for m in measured.values() if "threads" in m), None)},
        "data": about.get("data"),
        "model": about.get("model"),
        "recipe": next((c["recipe"] for c in choices if c["recipe"] is not None), None),
        "sources": code,
        "notes": [
            *notes_of(folder, study, choices, baseline["label"]),
            *(f"The code of {path} changed between runs." for path in changed),
        ],
        "choices": choices,
    }


def choice_record(folder: Path, study: Study, choice: Choice, measured: Mapping[str, Any]) -> Record:
    """What is known of one choice; `set_times` fills in its time."""
    runs = []
    tuned = None
    if study.tune is not None:
        places = trials_of(folder, choice, study.tune, study.trial_seed)
        runs = [run_record(place, folder) for _, place in sorted(places.items())]
        tried = {r["value"]: r["loss"] if r["status"] == "done" else None for r in runs}
        value = read_json(folder / "runs" / choice.folder / "tuned.json").get("value")
        tuned = (
            None if value is None else {"value": value, "edge": value in (min(tried), max(tried)), "trials": len(tried)}
        )
    finals = [run_record(place, folder) for place in finals_of(folder, choice, study.seeds)]
    finals = [r for r in finals if r["status"] != "missing"]
    through = [r for r in finals if r["status"] == "done"]
    error = choice.error or measured.get("error")
    if not error and not through:
        bad = [
            r for r in (*runs, *finals) if r["status"] == "failed" or (r["kind"] == "final" and r["status"] == "lost")
        ]
        error = bad[-1]["error"] if bad else None
    about = measured.get("record", {})
    made = [read_json(folder / r["folder"] / "run.json") for r in finals]
    same_data, same_also = unchanged(about, made)
    settings: Sequence[str] = read_json(folder / "equal.json").get("settings", {}).get(choice.label, [])
    recipe = None
    if choice.recipe is not None:
        recipe = Recipe.parse(choice.recipe.to_yaml(), *settings, name=study.name)
    return {
        "label": choice.label,
        "changes": dict(choice.changes),
        "recipe": None if recipe is None else recipe.to_mapping(),
        "status": "done" if len(through) == len(study.seeds) else "failed" if error else "partial",
        "error": error,
        "comparable": comparable(about, recipe) if same_data else "",
        "measured_on": measured_on(about, recipe) if same_data and same_also else "",
        "trade_off": trade_off(recipe),
        "steps": None if recipe is None else recipe.settings.steps,
        "parameters": about.get("model", {}).get("parameters"),
        "trained": about.get("model", {}).get("trained"),
        "tuned": tuned,
        "time": None,
        "memory": measured.get("memory"),
        "runs": runs + finals,
    }


def run_record(place: RunPlace, folder: Path) -> Record:
    """What came of one run, or how far it is."""
    end = place.read()
    curve = curve_of(place.out)
    status = "missing" if end is None and not curve["step"] else "interrupted" if end is None else end["status"]
    end = end or {}
    return {
        "kind": place.kind,
        "seed": place.seed,
        "value": place.value,
        "status": {"died": "failed", "diverged": "lost"}.get(status, status),
        "error": end.get("error"),
        "folder": str(place.out.relative_to(folder)),
        "loss": end.get("loss"),
        "measures": final_measures(curve),
        "steps": end.get("steps", curve["step"][-1] if curve["step"] else 0),
        "seconds": end.get("seconds"),
        "curve": curve,
    }


def curve_of(out: Path) -> dict[str, Any]:
    """Validation loss by step and by tokens seen, and `measures`, name → values, where any were taken."""
    path = out / "metrics.jsonl"
    tokens = 0
    found: dict[str, Any] = {"step": [], "tokens": [], "val_loss": []}
    for record in read(path) if path.is_file() else []:
        tokens += record.get("tokens", 0)
        if "val_loss" in record:
            loss = record["val_loss"]
            found["step"].append(record["step"])
            found["tokens"].append(tokens)
            found["val_loss"].append(finite(loss))
            for name, value in record.get("measures", {}).items():
                found.setdefault("measures", {}).setdefault(name, []).append(finite(value))
    return found


def finite(value: float) -> float | None:
    """A number, or None for what is none."""
    return value if abs(value) < float("inf") else None  # not NaN either


def final_measures(curve: Mapping[str, Any]) -> dict[str, float | None] | None:
    """The last value of each measure, or None where none was taken."""
    return {name: values[-1] for name, values in curve["measures"].items()} if "measures" in curve else None


def set_times(choices: Sequence[Record], measured: Mapping[str, Mapping[str, Any]], baseline: str) -> None:
    """Give every choice its time of a step, as a multiple of the baseline's in the same rounds.

    Seconds are that multiple of what the first choice took, so that all are of one spell of the machine; where that is
    void, they are the choice's own.
    """
    times = {label: m["time"] for label, m in measured.items() if "time" in m}

    def multiple(label: str) -> tuple[float, str]:
        """Of the time of which choice; of its own where it was measured alone."""
        return (times[label]["ratio"], times[label]["to"]) if times[label]["to"] in times else (1.0, label)

    for choice in choices:
        label = choice["label"]
        if label not in times:
            continue
        mine = times[label]
        ratio, to = multiple(label)
        step = mine["step"] if times[to]["void"] else ratio * times[to]["step"]
        choice["time"] = dict(mine) | {
            "step": step,
            "ratio": None,
            "phases": {name: seconds * step / mine["step"] for name, seconds in mine["phases"].items()},
            "tokens": measured[label]["tokens"],
        }
        if baseline not in times:
            continue
        of_base, base_to = multiple(baseline)
        if base_to == to:
            choice["time"] |= {"ratio": ratio / of_base} | ({"ratio_spread": None} if baseline != to else {})
        elif not mine["interleaved"]:
            choice["time"] |= {"ratio": step / (of_base * times[base_to]["step"]), "ratio_spread": None}


def comparable(about: Mapping[str, Any], recipe: Recipe | None) -> str:
    """The same text for choices whose losses are of the same thing: data, tokens, rows and objective."""
    return "" if recipe is None or not about else short_hash([*rows_of(about, recipe), recipe.objective.to_mapping()])


def measured_on(about: Mapping[str, Any], recipe: Recipe | None) -> str:
    """The same text for choices whose measures are of the same thing: as `comparable`, whatever the objective."""
    if recipe is None or not about or not (recipe.eval.measures or recipe.also):
        return ""
    return short_hash([*rows_of(about, recipe), about.get("also")])


def rows_of(about: Mapping[str, Any], recipe: Recipe) -> list[Any]:
    """What says which rows, cut into which tokens, a run is evaluated on."""
    data = recipe.data.options.to_mapping()
    return [
        about["data"]["sha256"],
        about["tokenizer"]["sha256"],
        {key: data.get(key) for key in ("length", "validation")},
        recipe.eval.rows,
    ]


def short_hash(what: Any) -> str:
    """Of JSON-able values."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def trade_off(recipe: Recipe | None) -> list[str] | None:
    """The two measures that the recipe's objective says to draw against each other, or None."""
    if recipe is None:
        return None
    objective = recipe.objective.module.build(recipe.objective.options)
    both: Sequence[str] | None = getattr(objective, "trade_off", None)
    return None if both is None else [*both]


def unchanged(about: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> tuple[bool, bool]:
    """Whether all runs had the data that a record tells of, and whether they had the other data of its measures."""
    made = [run for run in runs if run]
    same = all(content(run) == content(about) for run in made)
    return same, all(run.get("also") == about.get("also") for run in made)


def content(about: Mapping[str, Any]) -> list[Any]:
    """What identifies the data of a run, its tokens included."""
    return [about.get("data", {}).get("sha256"), about.get("tokenizer", {}).get("sha256")]


def notes_of(folder: Path, study: Study, choices: Sequence[Record], baseline: str) -> list[str]:
    """What a reader must know beside the numbers."""
    found = [*study.notes]
    if baseline != study.choices[0].label:
        found.append(f"The first choice, {study.choices[0].label}, has no result; {baseline} is the baseline instead.")
    if any("steps" in c.changes for c in study.choices):
        found.append("Steps are what is compared, so the choices see different numbers of tokens.")
    void = read_json(folder / "equal.json").get("void", [])
    if void:
        found.append(f"The steps of {', '.join(void)} come from times that varied too much from round to round.")
    if study.equal == "memory":
        peaks = {c["label"]: c["memory"]["peak"] for c in choices if c["memory"]}
        less = [label for label, peak in peaks.items() if peak < 0.9 * max(peaks.values())]
        if less:
            found.append(f"Memory could not be made equal for {', '.join(less)}: the memory below is what was used.")
    return found + mixed([read_json(path) for path in sorted((folder / "runs").glob("*/*/run.json"))])


def mixed(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What runs were made with that was not the same for all."""
    keys = ("versions", "threads", "device", "platform")
    return [
        f"Runs were made with more than one set of {key}; their run.json says which."
        for key in keys
        if len({json.dumps(run.get(key), sort_keys=True) for run in runs if run}) > 1
    ]


def tune_record(study: Study) -> Record | None:
    """How rates were tuned."""
    if study.tune is None:
        return None
    t = study.tune
    return {"key": t.key, "low": t.low, "high": t.high, "trials": t.trials, "seed": study.trial_seed, "rule": RULE}


def machine(about: Mapping[str, Any]) -> Record:
    """What a run's record says of where it was made."""
    return {key: about.get(key) for key in ("platform", "processor", "device", "python", "versions")}


def sources(outcomes: Iterable[Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """The code that runs were made with, path → hash, and the paths of which there was more than one version."""
    found: dict[str, str] = {}
    changed: dict[str, None] = {}
    for end in outcomes:
        for path, code in end.get("sources", {}).items():
            if found.setdefault(path, code) != code:
                changed[path] = None
    return found, list(changed)


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing when there is no such file or it is damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
