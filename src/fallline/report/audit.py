"""An audit as a table for the terminal and as one HTML file that needs neither a network nor a script."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .drawing import Look, document, key, keys, looks, path, text
from .figures import fixed

Curve = tuple[Sequence[float], Sequence[float]]
"""False and true positive rates, both rising from 0 to 1."""

WIDTH, HEIGHT = 480, 420
LEFT, RIGHT, TOP, BOTTOM = 52, 466, 10, 370
"""Of a chart and of its frame, in pixels."""

BETWEEN = 24
"""Points drawn within a sloped piece of a curve, which is bent where the axis is logarithmic."""


def table(record: Mapping[str, Any]) -> str:
    """One line a method, then what to keep in mind."""
    rows = [_heads(record), *(_cells(result) for result in record["results"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], "", *_sentences(record)])


def page(record: Mapping[str, Any], curves: Mapping[str, Curve]) -> str:
    """The page: the same table, the ROC of each method on linear and logarithmic axes, and the record but its scores.

    Args:
        record: what `audit.json` holds. curves: method → its ROC.
    """
    non_members = record["files"]["non_members"]["used"]
    least = 10.0 ** math.floor(math.log10(1 / non_members))
    drawn_as = looks(curves)
    charts = "".join(
        f"<div><h3>{title}</h3>{_chart(title, curves, drawn_as, low)}</div>"
        for title, low in (("Linear", None), ("Logarithmic in false positives", least))
    )
    kept = {name: value for name, value in record.items() if name not in ("scores", "results", "remarks")}
    wide = "grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr))"
    body = f"""<section><h2>How well members are told</h2>{_table(record)}
<p class="note">95 % intervals: of the area DeLong's, of the true positive rates Clopper and Pearson's.
Those of blind and mia-supervised are somewhat too narrow: the classifiers that give their scores are taken as given.
A score is high for what looks like a member; loss is the plain negative loss, blind sees words and lengths but no
model.</p>
</section>
<section><h2>ROC</h2>{key(drawn_as)}<div class="panels" style="{wide}">{charts}</div></section>
<section><h2>Record</h2><details><summary>Run, versions, files and hashes</summary>{keys(kept)}</details></section>"""
    title = f"{record['run']}: who was in the training data?"
    footer = "The score of every example is in audit.json, in the same folder."
    return document(title, record, _sentences(record), body, footer)


def estimate(value: float, low: float, high: float) -> str:
    """
    >>> estimate(0.9732, 0.9511, 0.9953), estimate(0.0, 0.0, 0.056)
    ('0.973 [0.951, 0.995]', '0.000 [0.000, 0.056]')
    """
    return f"{fixed(value, 3)} [{fixed(low, 3)}, {fixed(high, 3)}]"


def _heads(record: Mapping[str, Any]) -> list[str]:
    return ["method", "AUC [95 %]", *(f"TPR at {_percent(t['fpr'])} FPR" for t in record["results"][0]["tpr"])]


def _cells(result: Mapping[str, Any]) -> list[str]:
    return [result["method"], estimate(*result["auc"]), *(estimate(*t["value"]) for t in result["tpr"])]


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _sentences(record: Mapping[str, Any]) -> list[str]:
    used = {side: tally["used"] for side, tally in record["files"].items()}
    loss = {side: fixed(value, 3) for side, value in record["loss"].items()}
    first = (
        f"{used['members']} members with a mean loss of {loss['members']} nats a label, "
        f"{used['non_members']} non-members with {loss['non_members']}."
    )
    return [first, *record["remarks"]]


def _table(record: Mapping[str, Any]) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in _heads(record))
    rows = (
        f'<tr><th scope="row">{html.escape(first)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in map(_cells, record["results"])
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _chart(title: str, curves: Mapping[str, Curve], drawn_as: Mapping[str, Look], least: float | None) -> str:
    """The curves, and what guessing would give; with `least`, from that false positive rate on and logarithmic."""
    if least is None:
        at = [k / 5 for k in range(6)]
    else:
        at = [10.0**e for e in range(round(math.log10(least)), 1)]

    def x(rate: float) -> float:
        share = rate if least is None else 1 - math.log10(max(rate, least)) / math.log10(least)
        return LEFT + share * (RIGHT - LEFT)

    def y(rate: float) -> float:
        return BOTTOM + rate * (TOP - BOTTOM)

    def drawn(curve: Curve) -> str:
        return "M" + "L".join(f"{x(a):.1f},{y(b):.1f}" for a, b in _bent(curve, least))

    parts = []
    for rate in at:
        parts.append(f'<line class="grid" x1="{x(rate):.1f}" y1="{TOP}" x2="{x(rate):.1f}" y2="{BOTTOM}"/>')
        parts.append(text(x(rate), BOTTOM + 17, f"{rate:g}", "middle"))
    for rate in (k / 5 for k in range(6)):
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y(rate):.1f}" x2="{RIGHT}" y2="{y(rate):.1f}"/>')
        parts.append(text(LEFT - 7, y(rate) + 4, f"{rate:g}", "end"))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 38, "false positive rate", "middle"))
    middle = (TOP + BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(f'<text class="tick" x="14" y="{middle}" text-anchor="middle" {turned}>true positive rate</text>')
    parts.append(f'<path class="cross" d="{drawn(((0, 1), (0, 1)))}" fill="none"/>')
    parts += [path(drawn(curve), drawn_as[id], id) for id, curve in curves.items()]
    return (
        f'<div class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="ROC, {title.lower()}">'
        f"{''.join(parts)}</svg></div>"
    )


def _bent(curve: Curve, least: float | None) -> Iterable[tuple[float, float]]:
    """The points of a curve, with more of them in sloped pieces of a logarithmic chart."""
    points = list(zip(*curve, strict=True))
    yield points[0]
    for (a, b), (c, d) in pairwise(points):
        if least is not None and c > max(a, least) and d > b:
            start = max(a, least)
            for k in range(BETWEEN):
                rate = start * (c / start) ** (k / BETWEEN)
                yield rate, b + (rate - a) / (c - a) * (d - b)
        yield c, d
