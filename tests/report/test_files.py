"""The table for the terminal, CSV, JSON, and how files are written."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fallline.errors import StorageError
from fallline.report import analyse, table, write
from fallline.report.page import page

from .records import ALL, XSS, apart, many, measured, plain, record, study


@pytest.mark.parametrize("name", ALL)
def test_the_table_fits_and_names_every_choice(name: str) -> None:
    analysed = analyse(ALL[name]())
    lines = table(analysed).split("\n")
    assert max(map(len, lines)) <= 110
    assert lines.index("") == len(analysed["choices"]) + 2


def test_the_table_of_a_study() -> None:
    lines = table(analyse(study())).split("\n")
    assert lines[0].split() == ["lr", "val", "loss", "−", "adamw", "curve", "state/peak", "MiB", "step", "ms", "ratio"]
    assert lines[3].split()[:8] == ["scale", "0.001", "4.651", "±", "0.011", "−0.215", "[−0.229,", "−0.201]"]
    assert lines[3].split()[-3:] == ["1.0/42.3", "73.1", "1.03"]
    assert lines[3].split()[8] == "█▆▄▃▂▂▁▁▁▁▁▁"
    assert lines[6].split() == ["second…ng-name", "failed"]


def test_long_labels_keep_their_ends_apart() -> None:
    labels = [line.split()[0] for line in table(analyse(many())).split("\n")[2:27]]
    assert len(set(labels)) == 25


def test_columns_without_anything_are_left_out() -> None:
    head = table(analyse(plain())).split("\n")[0]
    assert "ratio" not in head
    assert head.split()[0] == "val"


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "report.csv").read_text(encoding="utf-8"))))


def test_csv_has_every_run_and_what_finds_it_again(tmp_path: Path) -> None:
    made = study()
    write(tmp_path, analyse(made))
    found = rows(tmp_path)
    assert len(found) == sum(len(c["runs"]) for c in made["choices"]) + 1, "a choice without runs has a row too"
    first = next(row for row in found if row["label"] == "scale" and row["kind"] == "final")
    canonical = json.dumps(made["choices"][2]["recipe"], sort_keys=True, separators=(",", ":"))
    assert {k: first[k] for k in ("seed", "status", "loss", "steps", "tokens", "fallline", "torch", "threads")} == {
        "seed": "1",
        "status": "done",
        "loss": "4.6527",
        "steps": "500",
        "tokens": "512000",
        "fallline": "0.1.0",
        "torch": "2.9.0",
        "threads": "2",
    }
    assert first["recipe_sha256"] == hashlib.sha256(canonical.encode()).hexdigest()
    assert float(first["step_seconds"]) == 0.0731
    assert int(first["peak_bytes"]) == made["choices"][2]["memory"]["peak"]
    assert (first["data_sha256"], first["model_sha256"]) == ("5f" * 32, "a7" * 32)
    assert found[-1]["status"] == "failed"
    assert "512 is more than" in found[-1]["error"]
    lost = next(row for row in found if row["status"] == "lost")
    assert (lost["loss"], lost["steps"]) == ("", "120")


def test_measures_are_columns(tmp_path: Path) -> None:
    analysed = analyse(measured())
    write(tmp_path, analysed)
    found = rows(tmp_path)
    assert next((r["exact"], r["docs/nll"], r["trained"]) for r in found if r["label"] == "dco") == (
        "0.61",
        "3.42",
        "2359296",
    )
    assert {"exact", "docs/nll"} <= set(table(analysed).split("\n")[0].split())


def test_the_last_measures_leave_where_there_is_no_room() -> None:
    made = measured()
    for c in made["choices"]:
        for run in c["runs"]:
            run["measures"] |= {f"another measure {n}": run["measures"]["exact"] for n in range(6)}
    lines = table(analyse(made)).split("\n")
    assert max(map(len, lines)) <= 110
    assert "docs/nll" in lines[0]
    assert "another measure 5" not in lines[0]


def test_a_void_timing_is_no_number_in_csv(tmp_path: Path) -> None:
    write(tmp_path, analyse(apart()))
    assert {row["step_seconds"] for row in rows(tmp_path) if row["label"] == XSS} == {""}


@pytest.mark.parametrize("name", ALL)
def test_json_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    analysed = analyse(ALL[name]())
    assert write(tmp_path / "new", analysed) == tmp_path / "new" / "report.html"
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == analysed
    assert sorted(os.listdir(tmp_path / "new")) == ["report.csv", "report.html", "report.json"]


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    made = plain()
    made["choices"][0]["runs"][0]["curve"]["val_loss"][3] = math.nan
    made["choices"][1]["runs"][0]["loss"] = math.inf
    write(tmp_path, analyse(made))
    back = json.loads((tmp_path / "report.json").read_text())
    assert back["choices"][0]["runs"][0]["curve"]["val_loss"][3] is None
    assert back["analysis"]["choices"][1]["verdict"] == "failed"


def test_a_report_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, analyse(study()))
    before = (tmp_path / "report.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"cannot write the report into .*: No space left on device"):
        write(tmp_path, analyse(plain()))
    assert (tmp_path / "report.json").read_bytes() == before


def test_no_text_of_a_record_ends_the_pages_data() -> None:
    text = page(analyse(apart()))
    assert text.count("</script>") == 2, "of the data and of the script"
    assert "<img" not in text
    marks = page(analyse(plain() | {"name": "{{SCRIPT}} {{DATA}} <!--<script>"}))
    assert marks.count('"use strict"') == 1
    assert "<!--" not in marks


def test_the_page_is_small_and_asks_for_nothing() -> None:
    text = page(analyse(record([], [])))
    assert len(text.encode()) < 150_000
    assert "default-src 'none'" in text
    assert "src=" not in text.replace("default-src", "").replace("img-src", "")
    assert "@import" not in text
    assert "url(http" not in text


def test_reports_are_made_without_torch() -> None:
    code = "import sys, fallline.report; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
