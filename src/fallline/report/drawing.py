"""What the pages of audits and inspections are drawn with."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

DASHES = ("", "7 3", "2 3", "9 3 2 3")

Look = tuple[str, str]
"""A curve's color and dashes."""


def looks(names: Iterable[str]) -> dict[str, Look]:
    """One for each curve, all different up to 32 of them."""
    return {name: (f"var(--c{k % 8})", DASHES[(k + k // 8) % 4]) for k, name in enumerate(names)}


def key(drawn_as: Mapping[str, Look]) -> str:
    """What the curves are called."""
    items = "".join(
        f'<li><svg width="34" height="10" aria-hidden="true">{path("M0,5H34", look)}</svg> {html.escape(name)}</li>'
        for name, look in drawn_as.items()
    )
    return f'<ul class="key">{items}</ul>'


def keys(tree: Mapping[str, Any]) -> str:
    """A mapping of mappings as a table of joined keys."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(value)}</td></tr>' for key, value in _flat(tree)
    )
    return f'<div class="scroll"><table class="keys"><tbody>{rows}</tbody></table></div>'


def _flat(tree: Mapping[str, Any], head: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def path(d: str, look: Look, title: str = "") -> str:
    """A curve."""
    color, dash = look
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    named = f"<title>{html.escape(title)}</title>" if title else ""
    return f'<path d="{d}" fill="none" style="stroke:{color}" stroke-width="2"{dashed}>{named}</path>'


def text(x: float, y: float, content: str, anchor: str) -> str:
    """A number at an axis."""
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def document(title: str, record: Mapping[str, Any], sentences: Iterable[str], body: str, footer: str) -> str:
    """A page that needs no network and no script.

    Args:
        title: as text.
        record: has `created`, `fallline` and `command`.
        sentences: as text.
        body: HTML of the sections between the sentences and the end.
        footer: as text.
    """
    about = [record["created"].replace("T", " ").replace("Z", " UTC"), f"Fallline {record['fallline']}"]
    command = f'<code class="command">{html.escape(record["command"])}</code>' if record["command"] else ""
    style = files(__package__).joinpath("assets", "page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><h1>{html.escape(title)}</h1><p class="about">{html.escape(" · ".join(about))}</p>{command}</header>
<section class="summary">{"".join(f"<p>{html.escape(s)}</p>" for s in sentences)}</section>
{body}
<footer>{html.escape(footer)}</footer>
</main>
</body>
</html>
"""
