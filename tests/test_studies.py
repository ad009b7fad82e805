"""The studies that are kept say what their records hold."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fallline.recipe import Recipe
from fallline.report import analyse

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.parent for path in ROOT.glob("studies/*/report.json"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_is_whole(study: Path) -> None:
    found = json.loads((study / "report.json").read_text(encoding="utf-8"))
    record = {key: value for key, value in found.items() if key != "analysis"}
    assert found == analyse(record), f"make it anew: fallline report {study.relative_to(ROOT)}"
    assert found["command"].startswith(f"fallline compare {study.relative_to(ROOT)}/recipe.yaml ")
    assert {choice["status"] for choice in found["choices"]} == {"done"}
    assert found["sources"]
    with (study / "report.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == sum(len(choice["runs"]) for choice in found["choices"])
    page = (study / "report.html").read_text(encoding="utf-8")
    assert all(choice["label"] in page for choice in found["choices"])


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_is_of_the_recipe_beside_it(study: Path) -> None:
    found = json.loads((study / "report.json").read_text(encoding="utf-8"))
    recipe = Recipe.load(study / "recipe.yaml")
    assert recipe.differences(found["recipe"]) == []
