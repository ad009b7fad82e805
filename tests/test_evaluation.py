"""What an evaluation measures beside the loss: packed rows, other data, pairs, other objectives."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fallline import Recipe
from fallline.contracts import STREAMS
from fallline.drivers.evaluation import Measures, evaluate, evaluation, passed
from fallline.drivers.setting import build
from fallline.drivers.train import train
from fallline.errors import InputError
from fallline.sequences import sequence_counts, sequence_logps
from fallline.tokens import IGNORED

TINY = "model: {name: llama, preset: tiny}"
LINES = "".join(json.dumps({"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"}) + "\n" for n in range(60))
PAIRS = "".join(
    json.dumps({"prompt": f"{n} is ", "chosen": f"number {n}", "rejected": f"nobody {n + 1}"}) + "\n" for n in range(60)
)


@pytest.fixture
def yaml(tmp_path: Path) -> str:
    (tmp_path / "lines.jsonl").write_text(LINES)
    return f"""
{TINY}
data: {{name: jsonl, path: {tmp_path}/lines.jsonl, length: 32, vocab: 300, validation: 0.3}}
steps: 2
batch: 2
sample: 0
"""


def test_measures_are_of_the_rows_of_the_loss(yaml: str) -> None:
    recipe = Recipe.parse(yaml, "eval={measures: [nll, exact, pass@1, pass@64], rows: 5}")
    setting = build(recipe)
    run, rows = setting.run, setting.dataset.validation
    found = evaluation(run, rows, 5, recipe.eval.measures, {})
    plain = evaluate(run, rows, 5)
    assert found["measures"]["nll"] == pytest.approx(plain, rel=1e-6)  # causal's own forward
    assert found["val_loss"] == pytest.approx(plain, rel=1e-6)
    assert found["measures"]["exact"] == 0
    assert 0 < found["measures"]["pass@1"] < found["measures"]["pass@64"] < 1
    assert run.model.training


def test_they_do_not_depend_on_the_objective_nor_on_the_micro_batch(yaml: str) -> None:
    asked = "eval={measures: [nll, exact], rows: 5}"
    first, other = (build(Recipe.parse(yaml, asked, *more)) for more in ((), ("objective=comp-sum", "micro=1")))
    told = [evaluation(s.run, s.dataset.validation, 5, ("nll", "exact"), {}) for s in (first, other)]
    assert told[0]["measures"] == pytest.approx(told[1]["measures"], rel=1e-6)
    assert told[0]["val_loss"] != pytest.approx(told[1]["val_loss"], rel=1e-3)


def test_by_hand() -> None:
    scores = torch.tensor([[[1.0, 2.0, 4.0, 0.5, 0.0]], [[1.0, 1.0, 0.0, 1.0, 0.0]]])
    batch = {
        "labels": torch.tensor([[5, 6, 7, 8, IGNORED]]),
        "segment": torch.tensor([[0, 0, 1, 2, 3]]),
        "example_id": torch.arange(4),  # the last one has no label
    }
    into = Measures(("nll", "exact", "pass@8"))
    into.add(scores, batch)
    chance = [1 - (1 - math.exp(-s)) ** 8 for s in (3.0, 4.0, 0.5)]
    assert into.values() == pytest.approx({"nll": 7.5 / 4, "exact": 2 / 3, "pass@8": sum(chance) / 3})


def test_the_chance_of_passing_at_its_ends() -> None:
    assert passed(torch.tensor([0.0, 800.0], dtype=torch.float64), 64).tolist() == [1, 0]


def test_pairs_have_two_answers(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(PAIRS)
    yaml = f"""
{TINY}
data: {{name: preference, path: {tmp_path}/pairs.jsonl, length: 64, vocab: 300, validation: 0.3}}
objective: simpo
steps: 2
batch: 2
"""
    setting = build(Recipe.parse(yaml, "eval={measures: [nll, rejected]}"))
    found = evaluation(setting.run, setting.dataset.validation, None, ("nll", "rejected"), {})["measures"]
    batch = next(setting.dataset.validation.batches(100))
    with torch.no_grad():
        setting.run.model.eval()
        each = -sequence_logps(setting.run.model, batch).sum(0) / sequence_counts(batch).sum(0)
    assert [found["nll"], found["rejected"]] == pytest.approx(each.tolist(), rel=1e-6)


def test_streams_are_measured_apart(tmp_path: Path) -> None:
    (tmp_path / "forget.jsonl").write_text(LINES)
    (tmp_path / "retain.jsonl").write_text(LINES.replace("and", "with"))
    yaml = f"""
{TINY}
data: {{name: unlearning, forget: {tmp_path}/forget.jsonl, retain: {tmp_path}/retain.jsonl, length: 64, vocab: 300}}
objective: graddiff
steps: 2
batch: 2
"""
    setting = build(Recipe.parse(yaml))
    rows = setting.dataset.validation
    found = evaluation(setting.run, rows, None, ("nll", "exact"), {})["measures"]
    assert list(found) == ["forget/nll", "retain/nll", "forget/exact", "retain/exact"]
    batch = next(rows.batches(100))
    setting.run.model.eval()
    with torch.no_grad():
        value, count = -sequence_logps(setting.run.model, batch)[:, 0], sequence_counts(batch)[:, 0]
    for code, name in STREAMS.items():
        mine = batch["domain"] == code
        assert found[f"{name}/nll"] == pytest.approx(float(value[mine].sum() / count[mine].sum()), rel=1e-6)


def test_other_data_is_measured_and_written(yaml: str, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"text {n} " * 9}) + "\n" for n in range(9)))
    also = f"{{other: {{name: jsonl, path: {tmp_path}/other.jsonl, length: 32}}}}"
    result = train(Recipe.parse(yaml, f"eval.also={also}", f"out={tmp_path}/run"), progress=None)
    evaluated = [m for m in result.metrics if "val_loss" in m]
    assert [list(m["measures"]) for m in evaluated] == [["other/nll"]] * 2
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["also"]["other"]["sha256"]
    assert Recipe.load(tmp_path / "run").to_mapping() == result_recipe(tmp_path)
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"else {n} " * 9}) + "\n" for n in range(9)))
    with pytest.raises(InputError, match=r"eval\.also: the content is not"):
        train(Recipe.load(tmp_path / "run"), resume=True, progress=None)


def result_recipe(folder: Path) -> object:
    return json.loads((folder / "run/run.json").read_text())["recipe"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("eval.measures=[nll, nll]", "names one twice"),
        ("eval.measures=[accuracy]", "measures.*one of nll, exact"),
        ("eval.measures=[rejected]", "the data has none"),
        ("eval.also=python-docs", "must be a mapping of names to data"),
        ("eval.also={docs: {name: python-dogs}}", "python-dogs"),
        ("eval.also={docs: {name: python-docs, lenght: 8}}", "lenght"),
    ],
)
def test_what_cannot_be_measured_is_said(yaml: str, override: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        build(Recipe.parse(yaml, override))
    assert "\n" not in str(error.value)
