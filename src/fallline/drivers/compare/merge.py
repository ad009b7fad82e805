"""A report anew: of a comparison, of several together, or of runs that were made one by one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...metrics import RATES, read
from ...recipe import FREE, Recipe
from ...report import analyse, write
from ...written import flat
from ..folder import next_free
from .measuring import spread
from .record import (
    Record,
    comparable,
    curve_of,
    final_measures,
    gather,
    machine,
    measured_on,
    mixed,
    read_json,
    trade_off,
    unchanged,
)
from .run import Comparison
from .study import read_study

KEYS = (
    *("format", "fallline", "name", "command", "created", "equal", "baseline", "seeds", "tune"),
    *("machine", "data", "model", "recipe", "sources", "notes", "choices"),
)
"""What a record holds."""


def rebuild(paths: Sequence[Path], out: Path | None = None) -> Comparison:
    """Make a report of what is there; nothing is run.

    Args:
        paths: folders of comparisons, their report.json, or run folders, which are put last as one comparison; the
            first has the baseline.
        out: where the report goes; None: into the folder of the comparison, of several the next free runs/report-N.

    Raises:
        InputError: a path holds neither, or nothing can be compared.
    """
    records: list[Record] = []
    runs: list[Path] = []
    for path in paths:
        if (path / "study.json").is_file():
            records.append(gather(path, read_study(path)))
        elif (path / "run.json").is_file():
            runs.append(path)
        else:
            records.append(read_report(path / "report.json" if path.is_dir() else path))
    if runs:
        records.append(of_runs(runs))
    if out is None:
        out = paths[0] if len(paths) == 1 and paths[0].is_dir() and not runs else next_free("report")
    found = analyse(records[0] if len(records) == 1 else merged(records))
    write(out, found)
    return Comparison(out, found)


def read_report(path: Path) -> Record:
    """A report.json.

    Raises:
        InputError: it is not there, or is something else.
    """
    if not path.is_file():
        raise InputError(f"{path.parent} holds neither a comparison (study.json, report.json) nor a run (run.json)")
    found = read_json(path)
    if not {"choices", "baseline"} <= set(found):
        raise InputError(f"{path} is not the report.json of a comparison")
    if lacks := [key for key in KEYS if key not in found]:
        raise InputError(f"{path} is damaged, or of another version of Fallline: it lacks {', '.join(lacks)}")
    return found


def merged(records: Sequence[Record]) -> Record:
    """The first record with the choices of all. The same choice in two of them has the runs of both; one that has
    another recipe or tuned value under the same label gets another label.

    Times are beside the first record's only where they were measured against the same baseline.
    """
    first = records[0]
    choices: dict[str, Record] = {}
    for number, record in enumerate(records):
        for given in record["choices"]:
            choice, label = dict(given) | {"planned": len(record["seeds"])}, given["label"]
            if number and choice["time"] is not None:
                choice["time"] = dict(choice["time"]) | {"interleaved": False, "ratio": None}
            if label in choices and what_ran(choices[label]) == what_ran(choice):
                choices[label] = joined(choices[label], choice)
                continue
            if label in choices:
                label = next(f"{label} ({n})" for n in range(2, 1000) if f"{label} ({n})" not in choices)
            choices[label] = choice | {"label": label}

    def alike(key: str) -> Any:
        """What all records have of it, or nothing."""
        return first[key] if all(record[key] == first[key] for record in records) else None

    notes = [note for record in records for note in record["notes"]]
    notes.append(
        f"Put together from {len(records)} comparisons; times of the second and later ones were not taken in turns "
        "with the first's."
    )
    if alike("tune") is None and any(record["tune"] for record in records):
        notes.append("They were tuned differently: each choice has the trials of its own comparison.")
    if any(record["equal"] != first["equal"] for record in records):
        notes.append("They did not hold the same equal.")
    seeds = sorted({run["seed"] for c in choices.values() for run in c["runs"] if run["kind"] == "final"})
    commands = list(dict.fromkeys(r["command"] for r in records if r["command"]))
    return dict(first) | {
        "choices": [*choices.values()],
        "seeds": seeds,
        "equal": alike("equal"),
        "tune": alike("tune"),
        "command": "; ".join(commands) or None,
        "sources": {path: code for record in reversed(records) for path, code in record["sources"].items()},
        "notes": list(dict.fromkeys(notes)),
    }


def what_ran(choice: Record) -> list[Any]:
    """What the runs of a choice that count were made with, but for their seeds."""
    recipe = {k: v for k, v in (choice["recipe"] or {}).items() if k != "seed"}
    return [recipe, (choice["tuned"] or {}).get("value")]


def joined(one: Record, other: Record) -> Record:
    """A choice with the runs of two records; a run that both have is the first one's."""
    have = {(r["kind"], r["seed"], r["value"]) for r in one["runs"]}
    runs = one["runs"] + [r for r in other["runs"] if (r["kind"], r["seed"], r["value"]) not in have]
    finals = [r for r in runs if r["kind"] == "final"]
    done = [r for r in finals if r["status"] == "done"]

    def alike(key: str) -> str:
        """What says which data both are of, or nothing where it is not the same."""
        found = {c.get(key) or "" for c in (one, other) if c["runs"]}
        return found.pop() if len(found) == 1 else ""

    return dict(one) | {
        "runs": runs,
        "planned": len(finals),
        "status": "done" if done and len(done) == len(finals) else one["status"] if not done else "partial",
        "error": None if done else one["error"],
        "comparable": alike("comparable"),
        "measured_on": alike("measured_on"),
        "time": one["time"] or other["time"],
        "memory": one["memory"] or other["memory"],
    }


def of_runs(paths: Sequence[Path]) -> Record:
    """A record of run folders: those of one recipe but for the seed are one choice.

    Raises:
        InputError: a run folder is damaged.
    """
    groups: dict[str, list[tuple[Path, Recipe, Mapping[str, Any]]]] = {}
    for path in paths:
        try:
            about = json.loads((path / "run.json").read_text(encoding="utf-8"))
            recipe = Recipe.parse(json.dumps(about["recipe"], ensure_ascii=False), name=path.name)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path / 'run.json'} is damaged ({error!r})") from None
        mapping = {k: v for k, v in recipe.to_mapping().items() if k not in (*FREE, "seed")}
        groups.setdefault(json.dumps(mapping, sort_keys=True), []).append((path, recipe, about))
    labels = labelled([flat(json.loads(key)) for key in groups])
    choices = [of_group(label, group) for label, group in zip(labels, groups.values(), strict=True)]
    base = choices[0]["time"]
    for choice in choices:
        if choice["time"] and base:
            choice["time"]["ratio"] = choice["time"]["step"] / base["step"]
    _, recipe, about = next(iter(groups.values()))[0]
    return {
        "format": 1,
        "fallline": about["fallline"],
        "name": recipe.name,
        "command": None,
        "created": None,
        "equal": None,
        "baseline": choices[0]["label"],
        "seeds": sorted({r["seed"] for c in choices for r in c["runs"]}),
        "tune": None,
        "machine": machine(about) | {"threads": about["threads"]},
        "data": about["data"],
        "model": about["model"],
        "recipe": choices[0]["recipe"],
        "sources": {},  # a run folder does not say
        "notes": [
            "These runs were made one by one: nothing was held equal for them but what their recipes say.",
            *mixed([about for group in groups.values() for _, _, about in group]),
        ],
        "choices": choices,
    }


def labelled(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells each recipe from the others: the methods that differ, and where that is not enough all that does."""
    keys = [k for k in {k: None for r in recipes for k in r} if len({json.dumps(r.get(k)) for r in recipes}) > 1]
    names = [k for k in keys if k.endswith(".name")]
    short = [" ".join(str(r.get(k)) for k in names) for r in recipes]
    if len(set(short)) == len(short) and all(short):
        return short
    rest = [k for k in keys if k not in names]
    whole = [
        " ".join([*text.split(), *(f"{k}={r[k]}" for k in rest if k in r)])
        for text, r in zip(short, recipes, strict=True)
    ]
    return [text or "run" for text in whole]


def of_group(label: str, group: Sequence[tuple[Path, Recipe, Mapping[str, Any]]]) -> Record:
    """One choice: runs that differ in the seed alone."""
    _, recipe, about = group[0]
    same_data, same_also = unchanged(about, [run for _, _, run in group])
    runs = []
    steps: list[float] = []
    tokens = 0
    for path, one, _ in group:
        curve = curve_of(path)
        records = read(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else []
        busy = [sum(s for k, s in r["time"].items() if k not in NOT_STEPS) for r in records if "time" in r]
        steps += busy[1:]
        tokens = max((r.get("tokens", 0) for r in records), default=tokens)
        through = bool(curve["step"]) and curve["step"][-1] >= one.settings.steps
        runs.append(
            {
                "kind": "final",
                "seed": one.settings.seed,
                "value": None,
                "status": "done" if through else "interrupted",
                "error": None,
                "folder": str(path),
                "loss": curve["val_loss"][-1] if through else None,
                "measures": final_measures(curve),
                "steps": curve["step"][-1] if curve["step"] else 0,
                "seconds": sum(busy),
                "curve": curve,
            }
        )
    done = [r for r in runs if r["status"] == "done"]
    time: Record | None = None
    if len(steps) > 1:
        time = {"step": statistics.median(steps), "spread": spread(steps), "ratio": None, "ratio_spread": None}
        time |= {"rounds": len(steps), "void": False, "interleaved": False, "tokens": tokens, "phases": {}}
    return {
        "label": label,
        "changes": {},
        "recipe": recipe.to_mapping(),
        "status": "failed" if not done else "done" if len(done) == len(runs) else "partial",
        "error": None if done else "no run of it is through",
        "comparable": comparable(about, recipe) if same_data else "",
        "measured_on": measured_on(about, recipe) if same_data and same_also else "",
        "trade_off": trade_off(recipe),
        "steps": recipe.settings.steps,
        "parameters": about["model"]["parameters"],
        "trained": about["model"].get("trained"),
        "tuned": None,
        "time": time,
        "memory": None,
        "runs": runs,
    }


NOT_STEPS = ("eval", "save", *RATES)
"""Entries of a record's `time` that are not part of a step."""
