"""What an inspection found, for the terminal and as one HTML file that needs neither a network nor a script."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from . import drawing

WIDTH, HEIGHT = 480, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 466, 10, 272
"""Of a chart and of its frame, in pixels."""


def text(record: Mapping[str, Any]) -> str:
    """The sentences, and the first table."""
    first = record["tables"][0]
    rows = [first["heads"], *first["rows"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    said = [textwrap.fill(sentence, 110) for sentence in record["remarks"]]
    return "\n".join([lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], "", *said])


def page(record: Mapping[str, Any]) -> str:
    """The page: sentences, charts, tables, and the record but its figures.

    Args:
        record: what the JSON file holds.
    """
    kept = {k: v for k, v in record.items() if k not in ("question", "remarks", "tables", "charts", "found")}
    wide = "grid-template-columns:repeat(auto-fill,minmax(min(26rem,100%),1fr))"
    charts = "".join(map(_chart, record["charts"]))
    drawn = f'<section><div class="panels" style="{wide}">{charts}</div></section>' if charts else ""
    tables = "".join(
        f'<section><h2>{html.escape(t["title"])}</h2>{_table(t)}<p class="note">{html.escape(t["note"])}</p></section>'
        for t in record["tables"]
    )
    body = f"""{drawn}{tables}
<section><h2>Record</h2><details><summary>Model, options, versions</summary>{drawing.keys(kept)}</details></section>"""
    footer = f"All figures are in {record['inspection']['name']}.json, in the same folder."
    return drawing.document(record["question"], record, record["remarks"], body, footer)


def _table(table: Mapping[str, Any]) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in table["heads"])
    rows = (
        f'<tr><th scope="row" style="max-width:none">{html.escape(first)}</th>'
        f"{''.join(f'<td>{html.escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in table["rows"]
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _chart(chart: Mapping[str, Any]) -> str:
    """Curves on linear axes, with what they are called."""
    xs = [x for curve in chart["curves"].values() for x in curve[0]]
    ys = [y for curve in chart["curves"].values() for y in curve[1]]
    across, up = ticks(min(xs), max(xs)), ticks(*(chart["ends"] or (min(0.0, *ys), max(ys))))

    def x(value: float) -> float:
        return LEFT + (value - across[0]) / (across[-1] - across[0]) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM + (value - up[0]) / (up[-1] - up[0]) * (TOP - BOTTOM)

    parts = []
    for at in across:
        parts.append(f'<line class="grid" x1="{x(at):.1f}" y1="{TOP}" x2="{x(at):.1f}" y2="{BOTTOM}"/>')
        parts.append(drawing.text(x(at), BOTTOM + 17, f"{at:g}", "middle"))
    for at in up:
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y(at):.1f}" x2="{RIGHT}" y2="{y(at):.1f}"/>')
        parts.append(drawing.text(LEFT - 7, y(at) + 4, f"{at:g}", "end"))
    parts.append(drawing.text((LEFT + RIGHT) / 2, BOTTOM + 38, html.escape(chart["x"]), "middle"))
    middle = (TOP + BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(
        f'<text class="tick" x="14" y="{middle}" text-anchor="middle" {turned}>{html.escape(chart["y"])}</text>'
    )
    looks = drawing.looks(chart["curves"])
    title = html.escape(chart["title"])
    for name, curve in chart["curves"].items():
        line = "L".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(*curve, strict=True))
        parts.append(drawing.path(f"M{line}", looks[name], name))
    return (
        f'<div><h3>{title}</h3>{drawing.key(looks)}<div class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}">{"".join(parts)}</svg></div></div>'
    )


def ticks(low: float, high: float) -> Sequence[float]:
    """Round numbers, evenly spaced, from the last one at or below `low` to the first at or above `high`; at least two.

    >>> ticks(0.1, 0.9), ticks(0, 37), ticks(0, 0)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 10.0, 20.0, 30.0, 40.0], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    """
    if high <= low:
        high = low + 1
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * 5 >= (high - low) * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]
