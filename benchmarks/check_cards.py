"""Whether every figure that a card quotes is as new as the code of its method.

    python benchmarks/check_cards.py

A card's `evidence` names the files that its figures come from: results of a benchmark, or the report of a study. Such a
file holds the `command` that wrote it and, as `sources`, the `code_hash` of each file it measured. The figures are
stale when the method, or the fast path it imports, is no longer what was measured, and when a command that `checked`
quotes in brackets is not that of an evidence file or the other way round; a study is quoted by its command or by the
path of its report.json. Prints a line for each such card.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fallline.catalog import ROOMS, Card, code_hash, code_of, read_card

ROOT = Path(__file__).parent.parent
PACKAGE = Path("src/fallline")
QUOTED = re.compile(r"\(((?:python benchmarks/\S+\.py|fallline compare)\b[^()]*|studies/[^()\s]+)\)")


def stale_cards(root: Path) -> list[str]:
    """A line for each card of the repository `root` whose figures are not to be trusted."""
    found = []
    for path, card in cards(root):
        problems = list(dict.fromkeys(stale(root, path, card)))
        if problems:
            found.append(f"{card.id}: {'; '.join(problems)}")
    return found


def cards(root: Path) -> Iterator[tuple[Path, Card]]:
    """Methods with evidence: (path relative to `root`, card)."""
    for room in ROOMS:
        for path in sorted((root / PACKAGE / room).glob("[a-z]*.py")):
            card = read_card(path)
            if card is not None and card.evidence:
                yield path.relative_to(root), card


def stale(root: Path, method: Path, card: Card) -> Iterator[str]:
    """What is wrong with the figures of one card."""
    quoted = set(QUOTED.findall(card.checked))
    known = set()
    for name in card.evidence:
        try:
            record = json.loads((root / name).read_text(encoding="utf-8"))
            command, sources = record["command"], record["sources"]
        except OSError:
            yield f"{name} is missing"
        except (ValueError, KeyError, TypeError):
            yield f"{name} is not JSON with `command` and `sources`"
        else:
            known |= {name, command}
            if not quoted & {name, command}:
                yield f"`checked` does not quote ({command}), of which there is evidence"
            for path in (file.relative_to(root) for file in code_of(root / method, root / PACKAGE)):
                change = changed(root, path, sources)
                if change:
                    yield f"{name} is older than {path}, which {change}; run again: {command}"
    for quote in sorted(quoted - known):
        yield f"`checked` quotes ({quote}), of which there is no evidence; run it and name its file in `evidence`"


def changed(root: Path, path: Path, sources: dict[str, Any]) -> str:
    """In words how a file differs from what was measured; empty if it does not."""
    if path.as_posix() not in sources:
        return "is not among its sources"
    return "" if sources[path.as_posix()] == code_hash(root / path) else "has changed since"


def main() -> int:
    found = stale_cards(ROOT)
    print("\n".join(found) if found else f"figures of {len(list(cards(ROOT)))} cards are as new as their code")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
