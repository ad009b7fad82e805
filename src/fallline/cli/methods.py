"""`fallline methods`: the catalogue on a terminal."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

from ..catalog import Entry, entries, search
from ..errors import InputError, nearest
from ..options import describe, type_hints


def methods(query: Sequence[str], *, as_json: bool) -> int:
    """Print the methods that match, or with ``show ID`` one card whole."""
    whole = bool(query) and query[0] == "show"
    found = _named(query[1:]) if whole else search(" ".join(query))
    if as_json:
        print(json.dumps([_plain(entry, whole) for entry in found], indent=2, ensure_ascii=False))
        return 0
    if whole:
        print("\n\n".join(_card(entry) for entry in found))
        return 0
    if not found:
        raise InputError(f"no method matches {' '.join(query)!r}; `fallline methods` lists all")
    width = max(len(e.card.id) for e in found), max(len(e.card.kind) for e in found)
    for entry in found:
        print(f"{entry.card.kind:{width[1]}}  {entry.card.id:{width[0]}}  {entry.card.summary}")
    return 0


def _named(words: Sequence[str]) -> list[Entry]:
    if len(words) != 1:
        raise InputError("give one id: fallline methods show ID")
    found = [entry for (_, id), entry in entries().items() if id == words[0]]
    if not found:
        raise InputError(f"no method {words[0]!r}; {nearest(words[0], (id for _, id in entries()))}")
    return found


def _options(entry: Entry) -> list[dict[str, Any]]:
    config = entry.load().Config
    hints = type_hints(config)
    return [
        {
            "name": f.name,
            "type": describe(hints[f.name]),
            "default": None if f.default is MISSING else f.default,
            "required": f.default is MISSING,
            "help": f.metadata.get("help", ""),
            "source": f.metadata.get("source", ""),
        }
        for f in fields(config)
    ]


def _plain(entry: Entry, whole: bool) -> dict[str, Any]:
    card = asdict(entry.card) | {"module": entry.module}
    return card | {"options": _options(entry)} if whole else card


def _card(entry: Entry) -> str:
    width = min(shutil.get_terminal_size().columns, 110)
    card = entry.card
    lines = [f"{card.id}  ({card.kind}, {entry.module})", ""]

    def add(label: str, text: str) -> None:
        if text:
            lines.extend(textwrap.wrap(text, width, initial_indent=f"{label:14}", subsequent_indent=" " * 14))

    add("what", card.summary)
    add("equation", card.equation)
    add("paper", card.paper + (f" ({card.year})" if card.year else ""))
    add("code", card.repository)
    add("acts on", card.acts_on)
    for label, names in (("reads", card.reads), ("gives", card.gives), ("needs", card.needs)):
        add(label, ", ".join(names))
    add("couples", card.couples)
    add("state bytes", "; ".join(f"{role}: {formula}" for role, formula in card.state_bytes.items()))
    add("traffic bytes", "; ".join(f"{role}: {formula}" for role, formula in card.traffic_bytes.items()))
    add("workspace", "; ".join(f"{role}: {formula}" for role, formula in card.workspace_bytes.items()))
    add("flops", card.flops)
    add("claim", card.claim)
    add("checked", card.checked)
    add("evidence", ", ".join(card.evidence))
    add("departures", card.departures)
    options = _options(entry)
    if options:
        lines += ["", "options"]
        for o in options:
            default = "required" if o["required"] else f"= {o['default']}"
            source = f" [{o['source']}]" if o["source"] else ""
            text = f"{o['name']} {default}: {o['help']} ({o['type']}){source}"
            lines.extend(textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="      "))
    return "\n".join(lines)
