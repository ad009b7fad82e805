"""`fallline eval`: the harness on tasks of our own, its numbers against our own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from fallline.cli.main import main
from fallline.generate import generate
from fallline.noise import rng
from talkers import byte_tokenizer, save_model

QUESTIONS = [("The cat", 0), ("A dog sat on", 1), ("Who", 2), ("When it rains", 1)]
CHOICES = ["red", "green and blue", "no"]

TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_choice: ["red", "green and blue", "no"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "own_likelihood": """
output_type: loglikelihood
doc_to_target: " green and blue"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
""",
    "own_text": """
output_type: generate_until
doc_to_target: "{{said}}"
generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(autouse=True, scope="module")
def own_tasks() -> Iterator[None]:
    """The harness reads thousands of files to know its own tasks, of which one slow test has need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder, byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Tasks over a local file; what the model says after the first two questions is in it as the right answer."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question, "answer": right, "said": said(tiny, question) if i < 2 else "something else"}
        for i, (question, right) in enumerate(QUESTIONS)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {folder / 'questions.jsonl'}}}\ntest_split: train\n"
        'doc_to_text: "{{question}}"\n'
    )
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    (folder / "own_broken.yaml").write_text(
        f"task: own_broken\ndataset_path: json\ndataset_kwargs: {{data_files: {folder / 'gone.jsonl'}}}\n"
        "test_split: train\noutput_type: multiple_choice\n"
    )
    return folder


def said(folder: Path, question: str) -> str:
    tokenizer = byte_tokenizer()
    ids = tokenizer(question).input_ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = generate(model, ids, 12, generator=rng(0, 0, "x"), temperature=0, eos=tokenizer.eos_token_id)
    return str(tokenizer.decode(whole[len(ids) :], skip_special_tokens=True))


@torch.no_grad()
def log_likelihood(folder: Path, question: str, choice: str) -> float:
    """log p(choice | question): Σ over the choice's tokens, with a space before it as the harness puts it."""
    tokenizer = byte_tokenizer()
    given, whole = tokenizer(question).input_ids, tokenizer(f"{question} {choice}").input_ids
    logits = AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([whole])).logits[0]
    chances = torch.log_softmax(logits.double(), -1)
    return float(sum(chances[i - 1, whole[i]] for i in range(len(given), len(whole))))


def results(path: Path) -> Any:
    return json.loads(path.read_text())["results"]


def test_the_numbers_are_the_models(
    tiny: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ",".join(TASKS)
    out = ("--out", str(tmp_path / "r.json"))
    assert main(["eval", str(tiny), "--include", str(tasks), "--tasks", names, "--batch", "3", *out]) == 0
    shown = capsys.readouterr().out
    assert all(f"|{name}" in shown for name in TASKS)
    found = results(tmp_path / "r.json")

    likelihoods = [[log_likelihood(tiny, question, choice) for choice in CHOICES] for question, _ in QUESTIONS]
    best = [max(range(3), key=row.__getitem__) for row in likelihoods]
    right = sum(b == answer for b, (_, answer) in zip(best, QUESTIONS, strict=True))
    assert found["own_choice"]["acc,none"] == right / 4
    mean = sum(row[1] for row in likelihoods) / 4
    assert torch.tensor(found["own_likelihood"]["perplexity,none"]).log() == pytest.approx(-mean, rel=1e-5)
    assert found["own_text"]["exact_match,none"] == 0.5
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["config"]["model"] == str(tiny)
    assert "samples" not in record


def test_only_the_first_examples(tiny: Path, tasks: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "r.json")
    assert main(["eval", str(tiny), "--include", str(tasks), "--tasks", "own_t*", "--limit", "2", "--out", out]) == 0
    found = results(tmp_path / "r.json")
    assert list(found) == ["own_text"]
    assert found["own_text"]["exact_match,none"] == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tasks", "own_choise"], "the harness has no task 'own_choise'; did you mean 'own_choice'?"),
        (["--tasks", "zzz"], "no task 'zzz'; lm-eval ls tasks lists them; --include FOLDER adds your own"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "own_text", "--batch", "0"], "--batch and --limit must be at least 1, got 0 and None"),
        (["--tasks", "own_text", "--out", "nowhere/r.json"], "--out: cannot write a file nowhere/r.json"),
        (["--tasks", "own_text", "--include", "nowhere"], "--include: there is no folder nowhere"),
    ],
)
def test_refused_in_one_line(
    tiny: Path, tasks: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert main(["eval", str(tiny), "--include", str(tasks), *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err.splitlines()[-1]


@pytest.mark.slow
def test_the_harness_has_tasks(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", TaskManager)
    assert main(["eval", str(tiny), "--tasks", "arc_eazy"]) == 2
    assert "the harness has no task 'arc_eazy'; did you mean 'arc_easy'?" in capsys.readouterr().err


def test_a_task_that_breaks_is_named(tiny: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny), "--include", str(tasks), "--tasks", "own_broken"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fallline: error: the harness stopped in own_broken: FileNotFoundError: ")


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "x", "--tasks", "arc_easy"]) == 2
    assert "the package lm_eval is missing; pip install 'fallline[eval]'" in capsys.readouterr().err
