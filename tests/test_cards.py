"""A card never quotes a figure older than its method's code."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fallline.catalog import code_hash

ROOT = Path(__file__).parent.parent
METHOD = "src/fallline/optim/halve.py"
KERNEL = "src/fallline/kernels/half.py"
RESULT = "benchmarks/results/speed.json"
COMMAND = "python benchmarks/speed.py --pairs 9"

CODE = f'''"""Halves."""

from ..catalog import Card
from ..kernels.half import half

CARD = Card(
    id="halve",
    kind="optimizer",
    summary="Halves.",
    checked="twice as fast ({COMMAND})",
    evidence=("{RESULT}",),
)


class Halve:
    """Half of it."""

    limit = 2
    """At most."""

    def rule(self, x):
        # for reasons
        return half(x)
'''


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = benchmark("check_cards")


def test_no_card_of_ours_is_stale() -> None:
    assert check.stale_cards(ROOT) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of one method with evidence that is up to date."""
    write(tmp_path, METHOD, CODE)
    write(tmp_path, KERNEL, "def half(x):\n    return x / 2\n")
    record(tmp_path)
    assert check.stale_cards(tmp_path) == []
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text(encoding="utf-8")
    assert old in text
    write(root, name, text.replace(old, new))


def record(root: Path, **changes: Any) -> None:
    sources = {name: code_hash(root / name) for name in (METHOD, KERNEL)}
    write(root, RESULT, json.dumps({"command": COMMAND, "sources": sources} | changes))


@pytest.mark.parametrize("name", [METHOD, KERNEL])
def test_changed_code_makes_a_figure_stale(tree: Path, name: str) -> None:
    edit(tree, name, "half(x)", "half(x, y)")
    expected = f"halve: {RESULT} is older than {name}, which has changed since; run again: {COMMAND}"
    assert check.stale_cards(tree) == [expected]
    record(tree)
    assert check.stale_cards(tree) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("twice as fast", "2.0 times as fast"),
        ('"""Halves."""', '"""Halves it.\n\n# at last\n"""'),
        ('    """Half of it."""', '    """Half."""  # of it'),
        ('    """At most."""\n', ""),
        ("for reasons", "for better reasons"),
        ("class Halve", "\n\n# ---\nclass Halve"),
    ],
    ids=["card", "module", "class", "attribute", "comment", "blank"],
)
def test_better_words_do_not(tree: Path, old: str, new: str) -> None:
    edit(tree, METHOD, old, new)
    assert check.stale_cards(tree) == []


def test_words_that_the_code_holds_are_code(tmp_path: Path) -> None:
    hashes = set()
    for text in (
        "x = '''\n# a\n'''\n",
        "x = '''\n# b\n'''\n",
        "x = '''\n# b\n\n'''\n",
        "x = f'''\n#\n'''\n",
        "x = 1  # a\n",
    ):
        write(tmp_path, "a.py", text)
        hashes.add(code_hash(tmp_path / "a.py"))
    for text in ("def f(): 'a'\n", "def f(): 'b'\n", "class A:\n    CARD = 1\n", "class A:\n    CARD = 2\n"):
        write(tmp_path, "a.py", text)
        hashes.add(code_hash(tmp_path / "a.py"))
    assert len(hashes) == 9


def test_the_hash_is_of_lines_of_text(tmp_path: Path) -> None:
    """So that files of results are read alike by all versions of Python; written with CRLF it is the same too."""
    import hashlib

    expected = hashlib.sha256(b"from a import (\n    b,\n)\nx = f'{b}'").hexdigest()
    write(tmp_path, "a.py", '"""A."""\nfrom a import (\n    b,\n    # c\n)\n\nCARD = None\nx = f\'{b}\'\n')
    assert code_hash(tmp_path / "a.py") == expected
    (tmp_path / "a.py").write_bytes((tmp_path / "a.py").read_bytes().replace(b"\n", b"\r\n"))
    assert code_hash(tmp_path / "a.py") == expected


@pytest.mark.parametrize(
    "line", ["from ..kernels.half import half", "from ..kernels import half", "from .part import x"]
)
def test_a_fast_path_must_be_among_the_sources(tree: Path, line: str) -> None:
    write(tree, "src/fallline/optim/part.py", "from ..kernels.half import half")
    edit(tree, METHOD, "from ..kernels.half import half", line)
    record(tree, sources={METHOD: code_hash(tree / METHOD)})
    (found,) = check.stale_cards(tree)
    assert f"{KERNEL}, which is not among its sources" in found


def test_so_must_the_orthogonalisation(tree: Path) -> None:
    write(tree, "src/fallline/polar.py", "")
    edit(tree, METHOD, "from ..catalog", "from ..polar import polar\nfrom ..catalog")
    record(tree)
    (found,) = check.stale_cards(tree)
    assert "src/fallline/polar.py, which is not among its sources" in found


def test_evidence_must_be_there(tree: Path) -> None:
    write(tree, RESULT, '{"sources": {}}')
    assert f"{RESULT} is not JSON with `command` and `sources`" in check.stale_cards(tree)[0]
    (tree / RESULT).unlink()
    assert f"{RESULT} is missing" in check.stale_cards(tree)[0]


def test_commands_and_evidence_name_each_other(tree: Path) -> None:
    study = "fallline compare recipes/tiny.yaml --over optimizer=adamw,halve"
    record(tree, command=study)
    (found,) = check.stale_cards(tree)
    assert f"quotes ({COMMAND}), of which there is no evidence" in found
    assert f"does not quote ({study})" in found
    edit(tree, METHOD, COMMAND, study)
    record(tree, command=study)
    assert check.stale_cards(tree) == []


def test_the_exit_code_tells(tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "ROOT", tree)
    assert check.main() == 0
    assert "1 cards" in capsys.readouterr().out
    (tree / RESULT).unlink()
    assert check.main() == 1
    assert capsys.readouterr().out.startswith("halve: ")


def test_benchmarks_write_what_is_checked(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = benchmark("harness")
    monkeypatch.setattr(harness, "ROOT", tree)
    monkeypatch.setattr(harness, "RESULTS", tree / "benchmarks/results")
    monkeypatch.setattr(sys, "argv", [str(tree / "benchmarks/speed.py"), "--pairs", "9"])
    (tree / RESULT).unlink()
    harness.save("speed", {}, [METHOD, KERNEL])
    assert check.stale_cards(tree) == []


def test_few_rounds_are_no_timing() -> None:
    compare = benchmark("harness").compare
    with pytest.raises(ValueError, match="6 pairs are too few"):
        compare({"nothing": lambda: None}, pairs=6)
    assert len(compare({"nothing": lambda: None}, pairs=7)["rounds"]["nothing"]) == 7
