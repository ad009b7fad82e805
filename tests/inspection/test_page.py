"""The page of an inspection: names are text and no markup, axes are round, nothing is asked of a network."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from fallline.report.inspection import page, text, ticks

ODD = "<img src=x onerror=alert(1)>"
RECORD = {
    "question": ODD,
    "remarks": [ODD],
    "tables": [{"title": ODD, "heads": ["", ODD], "rows": [[ODD, "3"]], "note": ODD}],
    "charts": [{"title": ODD, "x": ODD, "y": ODD, "curves": {ODD: ([0.0, 1.0], [2.0, -3.0])}, "ends": None}],
    "found": {},
    "created": "2025-01-01T00:00:00Z",
    "fallline": "0",
    "command": ODD,
    "inspection": {"name": "odd", ODD: ODD},
}


def test_names_are_text() -> None:
    made = page(RECORD)
    assert "<img" not in made
    assert "http" not in re.sub(r"http-equiv", "", made)
    (drawn,) = re.findall(r"<svg viewBox.*?</svg>", made, re.DOTALL)
    ET.fromstring(drawn)
    assert text(RECORD).splitlines()[2].split() == [*ODD.split(), "3"]


def test_without_charts_there_is_no_place_for_them() -> None:
    assert 'class="panels"' not in page(RECORD | {"charts": []})


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.1, 0.9, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 37, [0, 10, 20, 30, 40]),
        (-0.3, 4, [-1, 0, 1, 2, 3, 4]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1e-7, [0, 2e-8, 4e-8, 6e-8, 8e-8, 1e-7]),
    ],
)
def test_axes_are_round_and_hold_the_curves(low: float, high: float, wanted: list[float]) -> None:
    assert list(ticks(low, high)) == pytest.approx(wanted, abs=1e-12)
