"""Draw the errors of `memory_forecast.json`.

python benchmarks/memory_forecast_plot.py     # writes docs/memory_forecast.svg
"""

from __future__ import annotations

import json
import math

from harness import RESULTS, ROOT

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 300, 56, 44, 16, 12
MOST = 0.25  # error at the edge
COLOURS = {"development": "#8a8a8a", "held-back": "#0b62a4"}


def main() -> None:
    runs = json.loads((RESULTS / "memory_forecast.json").read_text())["runs"]
    low = math.floor(math.log10(min(run["measured"] for run in runs) / 2**20))
    high = math.ceil(math.log10(max(run["measured"] for run in runs) / 2**20))

    def x(measured: float) -> float:
        return LEFT + (math.log10(measured / 2**20) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(error: float) -> float:
        inside = max(-MOST, min(MOST, error))
        return TOP + (MOST - inside) / (2 * MOST) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" role="img" aria-label="Signed errors of memory forecasts against measured memory">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<rect x="{LEFT}" y="{y(0.1):.1f}" width="{WIDTH - LEFT - RIGHT}" height="{y(-0.1) - y(0.1):.1f}" '
        'fill="#eef3f7"/>',
    ]
    for error in (-0.2, -0.1, 0.0, 0.1, 0.2):
        line = "#444" if error == 0 else "#ccc"
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(error):.1f}" y2="{y(error):.1f}" stroke="{line}"/>'
            f'<text x="{LEFT - 6}" y="{y(error) + 4:.1f}" text-anchor="end">{100 * error:+.0f} %</text>'
        )
    for power in range(low, high + 1):
        at = x(2**20 * 10**power)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{10**power:,} MiB</text>')
    for run in runs:
        label = f"{run['model']}, {run['optimizer']}, {run['adapter']}, {run['rows']} × {run['length']}"
        parts.append(
            f'<circle cx="{x(run["measured"]):.1f}" cy="{y(run["error"]):.1f}" r="4" fill="{COLOURS[run["part"]]}" '
            f'fill-opacity="0.8"><title>{label}: {100 * run["error"]:+.1f} %</title></circle>'
        )
    for place, (part, colour) in enumerate(COLOURS.items()):
        parts.append(
            f'<circle cx="{LEFT + 10 + 120 * place}" cy="{HEIGHT - 10}" r="4" fill="{colour}"/>'
            f'<text x="{LEFT + 20 + 120 * place}" y="{HEIGHT - 6}">{part}</text>'
        )
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">measured memory, without weights</text>'
    )
    (ROOT / "docs" / "memory_forecast.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
