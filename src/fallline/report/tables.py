"""The comparison as a table for the terminal, and its runs as CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from . import figures

Columns = list[tuple[str, list[str]]]
"""(head, a cell for each choice)."""

WIDTH = 110
CURVE = 12
SHORTEST_LABEL = 8

COLUMNS = (
    "label",
    "kind",
    "seed",
    "value",
    "status",
    "loss",
    "steps",
    "tokens",
    "seconds",
    "error",
    "step_seconds",
    "peak_bytes",
    "trained",
    "fallline",
    "torch",
    "python",
    "device",
    "threads",
    "data_sha256",
    "model_sha256",
    "recipe_sha256",
)


def table(analysed: Mapping[str, Any]) -> str:
    """One line a choice, at most 110 columns wide, then the summary."""
    analysis = analysed["analysis"]
    rows = [(analysed["choices"][i], analysis["choices"][i]) for i in analysis["order"]]
    tune = analysed.get("tune")
    sparks = _sparklines([about for _, about in rows])
    measures: Columns = [
        (name, [about["measures"].get(name, {}).get("text", {}).get("value", "") for _, about in rows])
        for name in analysis["measures"]
    ]
    columns: Columns = [
        (tune["key"].rsplit(".", 1)[-1] if tune else "tuned", [about["text"]["tuned"] for _, about in rows]),
        ("val loss", [about["text"]["loss"] or about["verdict"] for _, about in rows]),
        (f"− {analysed['baseline']}"[:24], [about["text"]["difference"] for _, about in rows]),
        *measures,
        ("curve", sparks),
        ("state/peak MiB", [_memory(choice) for choice, _ in rows]),
        ("step ms", [about["text"].get("step", "").removesuffix(" ms") for _, about in rows]),
        ("ratio", [about["text"].get("ratio", "") for _, about in rows]),
    ]
    filled = [(head, cells) for head, cells in columns if any(cells)]
    if _wide(filled) + SHORTEST_LABEL > WIDTH:
        filled = [(head, cells) for head, cells in filled if cells is not sparks]
    for _, last in reversed(measures):
        if _wide(filled) + SHORTEST_LABEL > WIDTH:  # the report has them
            filled = [(head, cells) for head, cells in filled if cells is not last]
    labels = [about["label"] for _, about in rows]
    space = max(SHORTEST_LABEL, WIDTH - _wide(filled))
    lines = _lines([("", [_shortened(label, space) for label in labels]), *filled])
    said = [sentence for part in analysis["summary"].values() for sentence in part]
    return "\n".join([*lines, "", *(textwrap.fill(sentence, WIDTH) for sentence in said)])


def runs_csv(analysed: Mapping[str, Any]) -> str:
    """One row a run, trials too, and one for a choice that has none; each with what is needed to find it again."""
    machine = analysed.get("machine") or {}
    versions = machine.get("versions") or {}
    everywhere = {
        "fallline": analysed.get("fallline"),
        "torch": versions.get("torch"),
        "python": machine.get("python"),
        "device": machine.get("device"),
        "threads": machine.get("threads"),
        "data_sha256": (analysed.get("data") or {}).get("sha256"),
        "model_sha256": (analysed.get("model") or {}).get("sha256"),
    }
    out = io.StringIO()
    names = analysed["analysis"]["measures"]
    writer = csv.DictWriter(out, [*COLUMNS, *names], lineterminator="\n")
    writer.writeheader()
    for choice in analysed["choices"]:
        time = choice.get("time") or {}
        own = {
            "label": choice["label"],
            "step_seconds": None if time.get("void") else time.get("step"),
            "peak_bytes": (choice.get("memory") or {}).get("peak"),
            "trained": choice.get("trained"),
            "recipe_sha256": recipe_hash(choice["recipe"]) if choice.get("recipe") else None,
        }
        for run in choice.get("runs") or [{"status": choice["status"], "error": choice.get("error")}]:
            curve = run.get("curve") or {}
            reached = {
                "steps": run["steps"] if "steps" in run else curve["step"][-1] if curve.get("step") else None,
                "tokens": curve["tokens"][-1] if curve.get("tokens") else None,
            }
            of_run = {k: run.get(k) for k in ("kind", "seed", "value", "status", "loss", "seconds", "error")}
            measures = {name: (run.get("measures") or {}).get(name) for name in names}
            writer.writerow({**everywhere, **own, **of_run, **reached, **measures})
    return out.getvalue()


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe as JSON with sorted keys and no spaces."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sparklines(abouts: Sequence[Mapping[str, Any]]) -> list[str]:
    from ..metrics import sparkline  # imports torch, which only the table's callers have loaded

    curves = []
    for about in abouts:
        mean = (about["curve"] or {}).get("mean") or []
        last = len(mean) - 1
        picks = range(len(mean)) if last < CURVE else [round(i * last / (CURVE - 1)) for i in range(CURVE)]
        curves.append([float("nan") if mean[i] is None else mean[i] for i in picks])
    finite = [v for curve in curves for v in curve if v == v]
    return [sparkline(curve, min(finite), max(finite)) if finite else "" for curve in curves]


def _memory(choice: Mapping[str, Any]) -> str:
    memory = choice.get("memory")
    if not memory:
        return ""
    sizes = [memory.get("optimizer"), memory["peak"]]
    return "/".join("?" if s is None else figures.fixed(s / 2**20, 1) for s in sizes)


def _wide(columns: Columns) -> int:
    return sum(2 + max(map(len, (head, *cells))) for head, cells in columns)


def _shortened(label: str, space: int) -> str:
    """The middle goes: what tells long labels apart is often at their end."""
    if len(label) <= space:
        return label
    head = (space - 1) // 2
    return f"{label[:head]}…{label[len(label) - (space - 1 - head) :]}"


def _lines(columns: Columns) -> list[str]:
    heads, bodies = zip(*columns, strict=True)
    widths = [max(map(len, (head, *cells))) for head, cells in columns]

    def line(cells: Sequence[str]) -> str:
        left = [head in ("", "curve") for head in heads]
        parts = [f"{c:{'<' if on_left else '>'}{width}}" for c, on_left, width in zip(cells, left, widths, strict=True)]
        return "  ".join(parts).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return [line(heads), rule, *(line(cells) for cells in zip(*bodies, strict=True))]
