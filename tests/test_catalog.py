"""The catalogue: found without imports, searched by card, extended by entry points."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from fallline import catalog
from fallline.catalog import KINDS, ROOMS, Card, cost, entries, find, read_card, search
from fallline.errors import InputError
from fallline.options import Options, type_hints

ALL = list(entries().values())


@pytest.mark.parametrize("entry", ALL, ids=lambda e: f"{e.card.kind}/{e.card.id}")
def test_every_method_keeps_the_form(entry: catalog.Entry) -> None:
    module = entry.load()
    assert entry.card == module.CARD, "the literal and the object agree"
    assert entry.path.stem == entry.card.id.replace("-", "_")
    assert entry.card.kind in KINDS
    assert entry.card.kind in ROOMS[entry.path.parent.name]
    assert issubclass(module.Config, Options)
    assert type_hints(module.Config) is not None
    assert callable(module.build)
    assert module.__doc__
    assert entry.card.summary.endswith(".")
    assert entry.card.checked
    options = {f.name: 1 if f.default is MISSING else f.default for f in fields(module.Config)}
    card = entry.card
    for formula in (*card.state_bytes.values(), *card.traffic_bytes.values(), *card.workspace_bytes.values()):
        assert cost(formula, n=6, rows=2, cols=3, **options) >= 0


def test_listing_imports_neither_torch_nor_a_method() -> None:
    code = (
        "import sys, fallline.cli.main as m; m.main(['methods', '--json'])\n"
        "bad = [n for n in sys.modules if n == 'torch' or n.startswith('fallline.optim')]\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {card["id"] for card in json.loads(done.stdout)} >= {"scale", "adamw"}


def test_search_needs_every_word_and_ranks_ids_first() -> None:
    assert search("scale")[0].card.id == "scale"
    assert not search("scale zebra")
    assert len(search()) == len(ALL)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown optimizer 'skale'; did you mean 'scale'"):
        find("optimizer", "skale")


def test_a_package_adds_methods_by_entry_point(tmp_path: Path) -> None:
    """A real installed distribution in a real interpreter."""
    (tmp_path / "plug").mkdir()
    (tmp_path / "plug" / "__init__.py").write_text("")
    (tmp_path / "plug" / "halve.py").write_text(
        "from dataclasses import dataclass\n"
        "from fallline.catalog import Card\nfrom fallline.options import Options\n"
        "CARD = Card(id='halve', kind='optimizer', summary='Halves.')\n"
        "@dataclass(frozen=True)\nclass Config(Options):\n    pass\n"
        "def build(config, params, *, seed=0):\n    return None\n"
    )
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fallline.methods]\noptimizer/halve = plug.halve\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom fallline.cli.main import main\n"
    code += "assert main(['methods', 'show', 'halve']) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Halves." in done.stdout

    (info / "entry_points.txt").write_text("[fallline.methods]\noptimizer/halve = plug\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "names 'plug', which has no CARD" in done.stderr


def test_a_card_must_be_a_literal(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("CARD = Card(id=name(), kind='optimizer', summary='x')\n")
    with pytest.raises(InputError, match="must be a literal"):
        read_card(path)
    path.write_text("CARD = Card(id='bad', kind='optimizer', summary='x', colour='red')\n")
    with pytest.raises(InputError, match="colour"):
        read_card(path)
    path.write_text("x = 1  # no card, though it says CARD\n")
    assert read_card(path) is None
    path.write_text("CARD = Card(id='bad', kind='optimizer', summary='x')\n")
    assert read_card(path) == Card(id="bad", kind="optimizer", summary="x")


def test_cost_is_arithmetic_only() -> None:
    assert cost("4*n + max(rows, cols) // 2 - -1", n=2, rows=3, cols=5) == 11
    assert cost("n * (rows > 3)", n=2, rows=3) == 0
    assert cost("n * (split == 'rows') + (split == 'columns')", n=2, split="rows") == 2
    for bad in ("n.real", "__import__('os')", "m", "n if n else 0"):
        with pytest.raises(InputError, match="not arithmetic"):
            cost(bad, n=1)
