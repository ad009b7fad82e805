"""`fallline audit`: an over-trained model tells who was in its data; one that learned nothing, or labels at random, do
not."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from fallline.adapters import attach
from fallline.cli.main import main
from fallline.drivers.audit import audit, gradients, look, losses, pick
from fallline.drivers.audit_examples import Examples, identities, read_examples, read_training
from fallline.drivers.train import train
from fallline.drivers.trained import Trained, open_trained
from fallline.errors import InputError, NonFiniteError
from fallline.metrics.roc import auc
from fallline.noise import rng
from fallline.probes.attack import Seen, blind, cross_fitted, of_numbers
from fallline.recipe import Recipe
from talkers import byte_tokenizer, save_model

ATTACKS = ["mia-flora", "mia-gradnorm", "mia-supervised"]


def words(seed: int, lines: int) -> list[dict[str, str]]:
    """Random letters: nothing to learn but by heart. Every other line is a prompt with its completion."""
    random = np.random.default_rng(seed)
    said = [" ".join("".join(random.choice(list("abcdefgh"), 4)) for _ in range(4)) for _ in range(lines)]
    return [{"text": s} if i % 2 else {"prompt": s[:4], "completion": s[4:]} for i, s in enumerate(said)]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_for(folder: Path, out: str, *overrides: str) -> Recipe:
    return Recipe.parse(
        f"model: {folder / 'base'}\noptimizer: {{name: adamw, lr: 1e-2}}\nschedule: linear\nsteps: 200\nbatch: 16\n"
        f"data: {{name: jsonl, path: {folder / 'members.jsonl'}, length: 64}}\n"
        f"sample: 0\neval: {{every: 1000, rows: 2}}\nout: {folder / out}\n",
        *overrides,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, members and others, and a run that has learned the members by heart."""
    folder = tmp_path_factory.mktemp("audit")
    save_model(folder / "base", byte_tokenizer())
    write(folder / "members.jsonl", words(0, 60))
    write(folder / "others.jsonl", words(1, 60))
    train(recipe_for(folder, "run"), progress=None)
    return folder


@pytest.fixture(scope="module")
def lora(home: Path) -> Path:
    """The same with an adapter."""
    train(recipe_for(home, "lora", "adapter={name: lora, rank: 8}"), progress=None)
    return home / "lora"


def command(home: Path, run: Path, *more: str) -> list[str]:
    return [
        *("audit", str(run), "--members", str(home / "members.jsonl")),
        *("--non-members", str(home / "others.jsonl"), *more),
    ]


def load_base(home: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(home / "base").eval()


def examples_of(home: Path) -> Examples:
    """All members and others, at their word."""
    paths = (str(home / "members.jsonl"), str(home / "others.jsonl"))
    return read_examples(recipe_for(home, "run"), *paths, byte_tokenizer(), None)


def autograd(model: torch.nn.Module, where: str) -> tuple[float, float]:
    """Loss and norm of its gradient by the parameters that require one, of one line."""
    path, _, number = where.rpartition(":")
    row = json.loads(Path(path).read_text().splitlines()[int(number) - 1])
    bos, eos = model.config.bos_token_id, model.config.eos_token_id
    if "text" in row:
        ids = [bos, *byte_tokenizer()(row["text"]).input_ids, eos]
        labels = ids
    else:
        turn = [{"role": "user", "content": row["prompt"]}]
        begin = byte_tokenizer().apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        ids = [*begin, *byte_tokenizer()(row["completion"]).input_ids, eos]
        labels = [-100] * len(begin) + ids[len(begin) :]
    model.zero_grad()
    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    loss.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.stack(norms).norm().item()


def aucs(record: dict) -> dict[str, list[float]]:
    return {result["method"]: result["auc"] for result in record["results"]}


def test_a_model_that_learned_by_heart_leaks(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(home, home / "run")) == 0
    shown = capsys.readouterr().out
    record = json.loads((home / "run" / "audit" / "audit.json").read_text())
    found = aucs(record)
    assert list(found) == [*ATTACKS, "loss", "blind"]
    for name in (*ATTACKS, "loss"):
        assert found[name][0] > 0.9, name
        assert name in shown
    assert found["blind"][1] <= 0.5 <= found["blind"][2]
    assert record["loss"]["members"] < record["loss"]["non_members"] - 1
    held_out = record["files"]["members"]["held_out"]
    assert held_out > 0
    assert record["files"]["members"]["used"] == sum(row["member"] for row in record["scores"]) == 60 - held_out
    assert f"{held_out} that the run held out for validation left out" in shown
    assert "The TPR at 0.1 % FPR needs 10000 non-members, there are 60." in shown
    told = {row["where"]: row["mia-flora"] for row in record["scores"]}
    examples = examples_of(home)
    base, tuned = (losses(model, examples, 8) for model in (load_base(home), open_trained(str(home / "run")).model))
    for where, was, now in zip(examples.where, base, tuned, strict=True):
        assert where not in told or told[where] == pytest.approx(was - now, abs=1e-5)
    assert not any("not checked" in said or "drew" in said for said in record["remarks"])
    assert record["command"].startswith("fallline audit ")
    page = (home / "run" / "audit" / "audit.html").read_text()
    assert page.count("<svg viewBox") == 2
    assert all(name in page for name in found)
    assert "<script" not in page


def test_scores_of_an_adapter_run(home: Path, lora: Path, tmp_path: Path) -> None:
    found = audit(
        lora,
        str(home / "members.jsonl"),
        str(home / "others.jsonl"),
        methods=["mia-flora", "mia-gradnorm"],
        out=tmp_path,
    )
    assert list(aucs(found.record)) == ["mia-flora", "mia-gradnorm", "loss", "blind"]
    assert aucs(found.record)["mia-flora"][1] > 0.7
    assert found.record["model"]["adapter"]
    examples = examples_of(home)
    base, tuned = (losses(model, examples, 8) for model in (load_base(home), open_trained(str(lora)).model))
    told = {row["where"]: row for row in found.record["scores"]}
    for where, was, now in zip(examples.where, base, tuned, strict=True):
        if where in told:  # not those that were held out
            assert told[where]["mia-flora"] == pytest.approx(was - now, abs=1e-5)
    model = open_trained(str(lora)).model
    for name, p in model.named_parameters():
        p.requires_grad_(".adapters." in name)
    for where in (found.record["scores"][0]["where"], found.record["scores"][-1]["where"]):
        assert -told[where]["mia-gradnorm"] == pytest.approx(autograd(model, where)[1], rel=1e-4)
    assert (tmp_path / "audit.html").is_file()
    assert not (lora / "audit").exists()


def test_norms_are_autograds_one_at_a_time(home: Path) -> None:
    model = save_model(home / "again", byte_tokenizer())
    examples = examples_of(home)
    found = gradients(model, examples, 3, sketch=True)
    loss = losses(model, examples, 3)
    assert set(found["squared"]) == {name for name, _ in model.named_parameters()}
    score = pick(["mia-gradnorm"])["mia-gradnorm"].score(Seen(loss, **found), examples.member)
    for i in (0, 1, 70):
        own, norm = autograd(model, examples.where[i])
        assert loss[i] == pytest.approx(own, rel=1e-5)
        assert -score[i] == pytest.approx(norm, rel=1e-4)
    other = gradients(model, examples, 7, sketch=True)
    for field in ("squared", "sketch"):
        for name, values in found[field].items():
            np.testing.assert_allclose(values, other[field][name], rtol=1e-3, atol=1e-4 * np.abs(values).max())


def test_what_was_not_trained_scores_nothing(home: Path) -> None:
    """A LoRA begins as no change: the base answers with the adapter switched off as it does with it."""
    examples = examples_of(home)
    model = attach(save_model(home / "fresh", byte_tokenizer()), "lora", rank=4)
    attack = pick(["mia-flora"])["mia-flora"]
    trained = Trained("fresh", model, byte_tokenizer(), home / "fresh", adapter=True)
    seen = look(trained, home, examples, 8, attack.reads)
    score = attack.score(seen, examples.member)
    assert not score.any()
    assert auc(score, examples.member) == (0.5, 0.5, 0.5)


def test_permuted_labels_find_nothing(home: Path) -> None:
    """Within three standard errors of chance, √((m + n + 1) / 12 m n), for every method."""
    examples = examples_of(home)
    reads = frozenset({"loss", "base_loss", "squared", "sketch"})
    seen = look(open_trained(str(home / "run")), home / "run", examples, 8, reads)
    m, n = examples.member.sum(), (~examples.member).sum()
    error = np.sqrt((m + n + 1) / (12 * m * n))
    for seed in range(3):
        member = np.random.default_rng(seed).permutation(examples.member)
        scores = {name: attack.score(seen, member) for name, attack in pick(None).items()}
        for name, score in (scores | {"blind": blind(examples.text, examples.lengths, member)}).items():
            assert abs(auc(score, member).value - 0.5) < 3 * error, (name, seed)


def test_no_example_is_scored_by_a_classifier_that_saw_it() -> None:
    """Each example's own column is all there is to learn of it, so only a classifier that saw it could score it."""
    member = np.arange(40) % 2 == 0
    score = cross_fitted(of_numbers, np.eye(40), member)
    assert auc(score, member).value <= 0.5
    assert auc(cross_fitted(of_numbers, member[:, None] * 1.0, member), member).value == 1.0


def test_words_that_tell_members_are_told(home: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{row.get('text', 'x')} zebra {i}"} for i, row in enumerate(words(2, 60))]
    other = str(write(tmp_path / "zebras.jsonl", rows))
    found = audit(home / "run", str(home / "members.jsonl"), other, methods=["mia-flora"], out=tmp_path / "out")
    assert aucs(found.record)["blind"][1] > 0.9
    assert "told apart by their words and lengths alone" in found.record["remarks"][0]


def test_lengths_that_tell_members_are_told() -> None:
    """The same few words for all; where the lengths are alike too, nothing is told."""
    random = np.random.default_rng(0)
    member = np.arange(120) % 2 == 0
    texts = [" ".join(random.choice(list("abcdefgh"), 4)) for _ in member]
    for more, found in ((0, False), (8, True)):
        lengths = np.column_stack([random.integers(20, 30, 120) + more * member, np.full(120, 5)])
        _, low, high = auc(blind(texts, lengths, member), member)
        assert (low > 0.9) if found else (low <= 0.5 <= high)


def test_what_cannot_be_judged_is_counted(home: Path, tmp_path: Path) -> None:
    long = {"prompt": "a" * 80, "completion": "b"}
    rows = [*words(3, 12), words(3, 1)[0], {"text": "abcd " * 40}, long]
    path = str(write(tmp_path / "others.jsonl", rows))
    found = audit(home / "run", str(home / "members.jsonl"), path, methods=["mia-flora"], out=tmp_path / "out")
    tally = found.record["files"]["non_members"]
    assert {k: tally[k] for k in ("lines", "used", "cut", "left_out", "repeated")} == {
        "lines": 15,
        "used": 13,
        "cut": 1,
        "left_out": 1,
        "repeated": 1,
    }
    assert (
        "Of 15 non-members: 1 without a label left out, 1 judged by the first 64 tokens, "
        "1 that repeat another left out." in found.record["remarks"]
    )


def test_refused_in_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = write(tmp_path / "few.jsonl", words(5, 3))
    empty = write(tmp_path / "empty.jsonl", [])
    again = write(tmp_path / "again.jsonl", words(7, 6))
    trained_on = write(tmp_path / "trained.jsonl", [*words(6, 6), *words(0, 4)])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": }\n')
    members, others = str(home / "members.jsonl"), str(home / "others.jsonl")
    for run, pair, more, said in (
        (home / "base", (members, others), (), "is not the folder of a run: there is no run.json"),
        (home / "run", (members, members), (), f"--members and --non-members are both {members}"),
        (home / "run", (members, str(empty)), (), "empty.jsonl is empty or blank"),
        (home / "run", (members, str(few)), (), "--non-members has 3 usable examples in 3 lines"),
        (home / "run", (members, str(tmp_path / "gone.jsonl")), (), "there is no file or folder"),
        (home / "run", (members, str(broken)), (), "broken.jsonl:2: not JSON"),
        (home / "run", (members, str(trained_on)), (), "of --non-members is in what the run was trained on"),
        (home / "run", (str(again), others), (), f"{again}:1 of --members is not in what the run was trained on"),
        (home / "run", (members, others), ("--methods", "mia-gradnrm"), "did you mean 'mia-gradnorm'?"),
        (home / "run", (members, others), ("--methods", ","), "--methods names no method"),
        (home / "run", (members, others), ("--batch", "0"), "--batch must be at least 1, got 0"),
        (home / "run", (members, others), ("--out", str(few)), "--out: cannot write a folder"),
        (home / "run", (members, others), ("--device", "cuda:99"), "is not available here"),
    ):
        argv = ["audit", str(run), "--members", pair[0], "--non-members", pair[1], "--out", str(tmp_path / "o"), *more]
        assert main(argv) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert said in shown.err.splitlines()[-1]
    assert not (tmp_path / "o").exists()


def test_one_example_on_both_sides(home: Path, tmp_path: Path) -> None:
    """Of a run whose data is not known: otherwise it is on the wrong side of one of them."""
    both = write(tmp_path / "both.jsonl", [*words(6, 6), words(7, 4)[3]])
    again = write(tmp_path / "again.jsonl", words(7, 6))
    with pytest.raises(InputError, match=rf"{both}:7 of --members and {again}:4 of --non-members are the same"):
        read_examples(recipe_for(home, "run"), str(both), str(again), byte_tokenizer(), None)


def test_without_scikit_learn(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(command(home, home / "run")) == 2
    assert "the package sklearn is missing; pip install 'fallline[audit]'" in capsys.readouterr().err


def test_a_model_that_is_not_finite_is_named(home: Path) -> None:
    model = save_model(home / "broken", byte_tokenizer())
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    examples = examples_of(home)
    with pytest.raises(NonFiniteError, match=r"the model's loss on .*members\.jsonl:\d+ is not finite"):
        losses(model, examples, 8)


def test_membership_that_cannot_be_checked_is_said(home: Path, tmp_path: Path) -> None:
    """The data is another now, gone, or no lines; members are then taken at their word."""
    data = write(tmp_path / "members.jsonl", words(0, 60))
    train(recipe_for(home, "moved", f"data.path={data}", "steps=1", f"out={tmp_path / 'run'}"), progress=None)
    recipe, model = Recipe.load(tmp_path / "run"), tmp_path / "run" / "model"
    assert read_training(recipe, tmp_path / "run", model)[0] is not None
    write(data, words(0, 61))
    paths = [str(home / "members.jsonl"), str(home / "others.jsonl")]
    found = audit(tmp_path / "run", *paths, methods=["mia-flora"], out=tmp_path / "out")
    assert re.match(r"Membership was not checked: the data of .*run has changed", found.record["remarks"][0])
    assert "Membership was not checked" in (tmp_path / "out" / "audit.html").read_text()
    assert found.record["files"]["members"]["used"] == 60
    data.unlink()
    training, said = read_training(recipe, tmp_path / "run", model)
    assert training is None
    assert re.match(r"Membership was not checked: .*there is no file or folder", said[0])
    other = recipe_for(home, "text", f"data={{name: text, path: {home}, length: 64}}")
    assert "the run's data is 'text'" in read_training(other, tmp_path / "run", model)[1][0]


@pytest.mark.parametrize("sampler", ["uniform", "poisson"])
def test_members_that_were_never_drawn_are_counted(home: Path, tmp_path: Path, sampler: str) -> None:
    """One step of a few rows: what it drew is in the run's own signals."""
    options = (f"out={tmp_path / 'run'}", f"sampler={sampler}", "steps=1", "batch=3")
    result = train(recipe_for(home, "short", *options), progress=None)
    ids = result.run.sampler.draw(0, rng(0, 0, "draw")).ids  # the very sampler, with its secret
    paths = [str(home / "members.jsonl"), str(home / "others.jsonl")]
    record = audit(tmp_path / "run", *paths, methods=["mia-flora"], out=tmp_path / "out").record
    number = len(result.run.source)
    assert f"The run drew {len(ids)} of {number} training examples." in record["remarks"]
    assert record["files"]["members"]["never_drawn"] == number - len(ids) > 0
    assert any(f"{number - len(ids)} that no step of the run drew" in said for said in record["remarks"])
    asked = (Recipe.load(tmp_path / "run"), tmp_path / "run", tmp_path / "run" / "model")
    training, _ = read_training(*asked)
    every = identities(result.run.source)
    assert training is not None
    assert training.never_drawn == set(every) - {every[i] for i in ids}
    (asked[2].resolve().parent / "state.json").write_text("{")
    training, said = read_training(*asked)
    assert training is not None
    assert "Whether every member was drawn in training is not known" in said[0]


def test_what_is_in_both_files_was_trained_on(home: Path, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [*words(0, 4), *words(8, 6)])
    options = (f"data.validation_path={held}", "steps=1", f"out={tmp_path / 'run'}")
    train(recipe_for(home, "both", *options), progress=None)
    others = str(home / "others.jsonl")
    record = audit(tmp_path / "run", str(home / "members.jsonl"), others, methods=["mia-flora"]).record
    assert (record["files"]["members"]["used"], record["files"]["members"]["held_out"]) == (60, 0)
    with pytest.raises(InputError, match=r"held\.jsonl:1 of --non-members is in what the run was trained on"):
        audit(tmp_path / "run", str(home / "members.jsonl"), str(held), methods=["mia-flora"])


def test_a_base_that_has_changed_is_refused_before_the_passes(home: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "base", byte_tokenizer())
    options = (f"model={tmp_path / 'base'}", "steps=1", f"out={tmp_path / 'run'}")
    train(recipe_for(home, "run", *options), progress=None)
    save_model(tmp_path / "base", byte_tokenizer(), seed=1)
    paths = [str(home / "members.jsonl"), str(home / "others.jsonl")]
    with pytest.raises(InputError, match=r"the model '.*base' that .*run began with has changed since"):
        audit(tmp_path / "run", *paths)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        audit(tmp_path / "run", *paths)


def test_no_attack_of_that_name() -> None:
    with pytest.raises(InputError, match="unknown audit 'loss'"):
        pick(["loss"])
