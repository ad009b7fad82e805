"""The report as one HTML file that asks nothing of a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

SCRIPTS = ("drawing.js", "curves.js", "losses.js", "measures.js", "bars.js", "tuning.js", "page.js")
"""In the order in which they use each other; together they are the body of one function."""


def page(analysed: Mapping[str, Any]) -> str:
    """The page with its style, script and data inside.

    Text reaches the page only as JSON, from which the script makes text nodes; ``<`` is escaped there, so that no label
    ends the element.
    """
    data = json.dumps(_slim(analysed), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    html = _asset("page.html")
    script = "".join(_asset(name) for name in SCRIPTS)
    for mark, text in (("STYLE", _asset("page.css")), ("SCRIPT", script), ("DATA", data)):
        head, _, tail = html.partition(f"{{{{{mark}}}}}")
        html = head + text + tail
    return html


def _slim(analysed: Mapping[str, Any]) -> dict[str, Any]:
    """Without the curves that the page does not draw: of trials, and of final runs that are in the mean."""

    def run(of: Mapping[str, Any]) -> dict[str, Any]:
        drawn = of["kind"] == "final" and of["status"] != "done"
        return {k: v for k, v in of.items() if k != "curve" or drawn}

    choices = [{**c, "runs": [run(r) for r in c.get("runs") or ()]} for c in analysed["choices"]]
    return {**analysed, "choices": choices}


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
