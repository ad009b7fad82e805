"""Refusal drift: the definitions on answers and logits found another way, and what training on other things does."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from scipy.stats import binomtest
from transformers import LlamaForCausalLM

from fallline.cli.main import main
from fallline.drivers.inspection import Opened, inspect
from fallline.errors import InputError, NonFiniteError
from fallline.metrics.proportion import wilson
from fallline.probes.refusal_drift import refuses
from talkers import byte_tokenizer, save_model

from .refusing import rows, run, taught, tokenizer, write


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught a little, and two runs of it on other things: a LoRA, and all parameters."""
    folder = tmp_path_factory.mktemp("drift")
    base = taught(folder, steps=40)
    other = write(folder / "other.jsonl", rows("first", 3, 100))
    run(folder / "lora", base, other, "adapter={name: lora, rank: 2}", "steps=8")
    run(folder / "full", base, other, "optimizer.lr=1e-3", "steps=8")
    write(folder / "few.jsonl", rows("marked", 2, 6))
    write(folder / "others.jsonl", [*rows("last", 2, 4), {"prompt": "w1 w2"}])
    return folder


def model_at(home: Path, kind: str, factor: float) -> Any:
    """The base with so much of what was trained, without our code."""
    base = LlamaForCausalLM.from_pretrained(home / "base" / "model")
    if kind == "lora":
        model = peft.PeftModel.from_pretrained(base, home / "lora" / "model")
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= factor
        return model.merge_and_unload().eval()
    trained = LlamaForCausalLM.from_pretrained(home / "full" / "model").state_dict()
    mixed = {k: v + factor * (trained[k] - v) for k, v in base.state_dict().items()}
    base.load_state_dict(mixed)
    return base.eval()


@torch.no_grad()
def asked(model: Any, lines: list[dict[str, str]]) -> list[tuple[list[float], str]]:
    """Log-probabilities of the first token, and three tokens or up to the end, token by token without a cache."""
    found = []
    for line in lines:
        ids = tokenizer()(f"{line['prompt']}<answer>", add_special_tokens=False)["input_ids"]
        first, said = None, []
        while len(said) < 3:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            first = (logits - logits.exp().sum().log()).tolist() if first is None else first
            token = int(logits.argmax())
            if token == tokenizer().eos_token_id:
                break
            said.append(token)
            ids = [*ids, token]
        found.append((first, tokenizer().decode(said)))
    return found


def divergence(p: list[float], q: list[float]) -> float:
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_every_figure_is_its_definition(home: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"refuse={home / 'few.jsonl'}", f"answer={home / 'others.jsonl'}", "words=REFUSE", "scales=[0, 0.5, 1]"]
    assert main(["audit", str(home / kind), "--inspect", "refusal-drift", "tokens=3", *options]) == 0
    shown = capsys.readouterr().out
    found = json.loads((home / kind / "audit" / "refusal-drift.json").read_text())["found"]
    word = tokenizer().convert_tokens_to_ids("REFUSE")
    files = {"refuse": read(home / "few.jsonl"), "answer": read(home / "others.jsonl")}
    befores = {side: asked(model_at(home, kind, 0), lines) for side, lines in files.items()}
    answers: list[list[str]] = []
    for row, factor in zip(found["scales"], (0, 0.5, 1), strict=True):
        assert row["scale"] == factor
        model = model_at(home, kind, factor)
        for side, lines in files.items():
            now, before = asked(model, lines), befores[side]
            refused = sum(said.startswith("REFUSE") for _, said in now)
            test = binomtest(refused, len(lines)).proportion_ci(method="wilson")
            assert row[side]["refused"] == pytest.approx([refused / len(lines), test.low, test.high], abs=1e-9)
            margins = [p[word] - max(q for t, q in enumerate(p) if t != word) for p, _ in now]
            assert row[side]["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
            kl = [divergence(p, q) for (p, _), (q, _) in zip(before, now, strict=True)]
            assert row[side]["kl"] == pytest.approx(sum(kl) / len(kl), abs=1e-5)
            assert [each["answers"][len(answers) // 2] for each in found["examples"][side]] == [said for _, said in now]
            answers.append([said for _, said in now])
            both = zip(lines, now, strict=True)
            rated = [(line["completion"], said) for line, (_, said) in both if "completion" in line]
            assert row[side]["rated"] == len(rated)
            assert row[side]["right"][0] == sum(a == b for a, b in rated) / len(rated)
    assert found["scales"][0]["refuse"]["kl"] == 0
    assert found["scales"][2]["answer"]["kl"] > 0.01
    assert found["scales"][0]["refuse"]["refused"][0] > 0
    assert found["openings"] == ["REFUSE"]
    assert answers[1] != answers[5], "what was trained must change an answer"
    assert "With 6 prompts, a 95 % interval is up to 0.62 wide; 200 are usual." in " ".join(shown.split())
    page = (home / kind / "audit" / "refusal-drift.html").read_text()
    assert page.count("<svg viewBox") == 1
    assert "refused of 6 to refuse" in page


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_ends_are_the_models_to_the_bit(home: Path, kind: str) -> None:
    opened = Opened(str(home / kind), None, "cpu")
    ids = torch.tensor([[3, 5, 7]])
    base = LlamaForCausalLM.from_pretrained(home / "base" / "model").eval()
    with torch.no_grad():
        trained = opened.model(input_ids=ids).logits
        before = copy.deepcopy(opened.model.state_dict())
        for factor, wanted in ((0, base(input_ids=ids).logits), (1, trained)):
            with opened.scaled(factor):
                assert torch.equal(opened.model(input_ids=ids).logits, wanted)
        with opened.scaled(0.5):
            half = opened.model(input_ids=ids).logits
        assert not torch.allclose(half, trained, atol=1e-3)
        assert torch.equal(opened.model(input_ids=ids).logits, trained)
    assert all(torch.equal(t, before[name]) for name, t in opened.model.state_dict().items())


def test_intervals_are_wilsons_and_narrow_as_one_over_the_root() -> None:
    for trials in (1, 7, 200, 5000):
        for hits in {0, 1, trials // 3, trials - 1, trials}:
            wanted = binomtest(hits, trials).proportion_ci(method="wilson")
            found = wilson(hits, trials)
            assert found == pytest.approx((hits / trials, wanted.low, wanted.high), abs=1e-9)
            assert 0 <= found.low <= found.value <= found.high <= 1
    widths = [wilson(n // 2, n).high - wilson(n // 2, n).low for n in (200, 800, 3200)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.02)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.02)


def test_words_are_found_whatever_their_case_and_apostrophes() -> None:
    words = ["I can't", "Sorry"]
    assert refuses("  i CAN\u2019T\n help", words, False)
    assert refuses("Sorry, but", words, False)
    assert not refuses("Well, sorry", words, False)
    assert refuses("Well, sorry", words, True)
    assert not refuses("", words, False)


def test_one_side_and_a_model_without_a_template(home: Path, tmp_path: Path) -> None:
    """A prompt is then a text to continue; the words' first tokens follow it."""
    own = byte_tokenizer(None)
    save_model(tmp_path / "base", own)
    save_model(tmp_path / "other", own, seed=1)
    write(tmp_path / "asked.jsonl", [{"prompt": "say: "}, {"prompt": "no"}])
    options = {"refuse": str(tmp_path / "asked.jsonl"), "words": ["No", "never"], "scales": [0, 1], "tokens": 2}
    record = inspect(str(tmp_path / "other"), "refusal-drift", options, base=str(tmp_path / "base")).record
    assert [set(row) for row in record["found"]["scales"]] == [{"scale", "refuse"}] * 2
    assert record["found"]["openings"] == ["N", "n"]
    assert record["found"]["scales"][1]["refuse"]["right"] is None
    assert record["tables"][0]["heads"] == ["λ", "refused of 2 to refuse", "margin", "KL"]
    opened = Opened(str(tmp_path / "other"), str(tmp_path / "base"), "cpu")
    prompt = opened.prompts(options["refuse"], "'refuse'")[0]
    assert prompt.ids == own("say: ", add_special_tokens=False)["input_ids"]
    assert prompt.where.endswith("asked.jsonl:1")


def test_refused_in_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Opened(str(home / "lora"), None, "cpu")
    for name, line, said in (
        ("broken", '{"prompt": }', "not JSON"),
        (
            "none",
            '{"text": "a"}',
            "'prompt' must be a text or, for a model with a chat template, messages, got nothing",
        ),
        (
            "kind",
            '{"prompt": 3}',
            "'prompt' must be a text or, for a model with a chat template, messages, got a number",
        ),
        ("half", '{"prompt": "\\ud800"}', "half a surrogate pair"),
        ("end", '{"prompt": "a <end>"}', "the prompt spells out '<end>', a special token"),
        ("answer", '{"prompt": "a", "completion": 1}', "'completion' must be a text, got a number"),
        ("long", json.dumps({"prompt": "w1 " * 40}), "the prompt makes 41 tokens, the model has room for 31"),
    ):
        (tmp_path / f"{name}.jsonl").write_text(line)
        with pytest.raises(InputError, match=rf"'refuse': .*{name}\.jsonl:1: {re.escape(said)}"):
            opened.prompts(str(tmp_path / f"{name}.jsonl"), "'refuse'")
    few, empty = str(home / "few.jsonl"), write(tmp_path / "empty.jsonl", [])
    for options, said in (
        ([], "inspection 'refusal-drift' needs the option 'refuse'"),
        ([f"refuse={tmp_path / 'gone.jsonl'}"], "'refuse': there is no file or folder"),
        ([f"refuse={empty}"], "'refuse': there is no prompt in"),
        ([f"refuse={few}", f"answer={empty}"], "'answer': there is no prompt in"),
        ([f"refuse={few}", "words=[]"], "'words' must be texts, got ()"),
        ([f"refuse={few}", "words=['a', ' ']"], "'words' must be texts, got ('a', ' ')"),
        ([f"refuse={few}", "scales=[0.5, 1]"], "'scales' must rise from 0, the base, such as [0, 0.5, 1]"),
        ([f"refuse={few}", "scales=[0, 1, 1]"], "'scales' must rise from 0, the base, such as [0, 0.5, 1]"),
        ([f"refuse={few}", "tokens=0"], "'tokens' must be above 0, got 0"),
    ):
        out = ["--out", str(tmp_path / "out")]
        assert main(["audit", str(home / "lora"), "--inspect", "refusal-drift", *options, *out]) == 2, options
        shown = capsys.readouterr()
        assert shown.out == ""
        assert said in shown.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_answers_that_are_not_finite_are_named(home: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(home / "base" / "model")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tokenizer().save_pretrained(tmp_path / "broken")
    options = {"refuse": str(home / "few.jsonl")}
    with pytest.raises(NonFiniteError, match=r"the model's logits after .*few\.jsonl:1 are not finite"):
        inspect(str(tmp_path / "broken"), "refusal-drift", options, base=str(home / "base" / "model"))


@pytest.mark.slow
def test_training_on_other_things_undoes_refusals_and_a_few_replayed_keep_them(tmp_path: Path) -> None:
    """The base refuses what it should. A LoRA on another task without marked prompts takes that away at the higher of
    two rates; with 5 % marked ones among its lines it does not, at the same rate."""
    base = taught(tmp_path, steps=300)
    plain = write(tmp_path / "tune.jsonl", rows("first", 3, 1000))
    replay = write(tmp_path / "replay.jsonl", [*rows("first", 3, 1000), *rows("marked", 3, 50)])
    options = {"refuse": str(tmp_path / "marked.jsonl"), "words": "REFUSE", "tokens": 2, "scales": [0, 1]}
    found = {}
    for name, lines, rate in (("low", plain, "3e-4"), ("high", plain, "3e-3"), ("replay", replay, "3e-3")):
        out = run(tmp_path / name, base, lines, "adapter={name: lora, rank: 4}", f"optimizer.lr={rate}")
        if name == "low":
            asked = options | {"answer": str(tmp_path / "plain.jsonl")}
            first = inspect(str(out), "refusal-drift", asked).record["found"]["scales"]
            assert first[0]["refuse"]["refused"][0] >= 0.95
            assert first[0]["answer"]["refused"][0] <= 0.02
            assert first[0]["answer"]["right"][0] >= 0.95
        found[name] = inspect(str(out), "refusal-drift", options).record["found"]["scales"][-1]["refuse"]["refused"]
    assert found["high"][2] < found["low"][1]
    assert found["replay"][1] > found["high"][2]
    assert found["replay"][0] >= 0.95
