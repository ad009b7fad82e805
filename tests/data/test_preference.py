"""Pairs of answers: the same tokens and labels as each answer alone, what is left out, and broken lines."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_jsonl import CHATML, chat, one, own, write  # noqa: F401

from fallline.contracts import Draw
from fallline.data.preference import Config, build
from fallline.errors import InputError
from fallline.noise import rng


def pair(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"What is number {i}?", "chosen": f"It is {i * i}.", "rejected": "No idea."} | more


def made(tmp_path: Path, tokenizer: Any, *lines: Any, **options: Any) -> Any:
    held = write(tmp_path / "held.jsonl", pair(1))
    config = {"path": str(write(tmp_path / "lines.jsonl", *lines)), "validation_path": str(held), "length": 256}
    return build(Config.from_mapping(config | options, "data 'preference'"), tokenizer)


def told(source: Any) -> list[list[tuple[list[int], list[int]]]]:
    """(token ids, places of labels) of both sequences of each example, as batches show them; and what must hold."""
    out = []
    for batch in source.batches(4):
        assert torch.equal(batch["side"] < 0, batch["segment"] < 0)
        for i in range(len(batch["example_id"])):
            here = batch["segment"] == i
            sides = []
            for side in (0, 1):
                ids, labels, place = (
                    batch[name][here & (batch["side"] == side)].tolist()
                    for name in ("input_ids", "labels", "position_ids")
                )
                assert place == list(range(len(ids)))
                asked = [at for at, label in enumerate(labels, 1) if label != -100]
                assert [ids[at] for at in asked] == [labels[at - 1] for at in asked]
                sides.append((ids, asked))
            out.append(sides)
        for row in range(len(batch["segment"])):  # no document seems to begin in padding
            padded = batch["position_ids"][row][batch["segment"][row].cummax(0).values == batch["segment"][row].max()]
            second = padded[padded.tolist().index(0, 1) :]
            assert second.tolist() == list(range(len(second)))
    return out


@pytest.mark.parametrize("template", [None, CHATML])
def test_an_answer_is_what_jsonl_makes_of_it_alone(tmp_path: Path, own: Any, template: str | None) -> None:  # noqa: F811
    tokenizer = own(template)
    line = pair(7)
    ((chosen, rejected),) = told(made(tmp_path, tokenizer, line).train)
    for key, got in (("chosen", chosen), ("rejected", rejected)):
        ids, asked, _ = one(tmp_path, tokenizer, {"prompt": line["prompt"], "completion": line[key]})
        assert got == (ids, asked)


def test_all_forms_say_the_same(tmp_path: Path, own: Any) -> None:  # noqa: F811
    tokenizer, line = own(), pair(7)
    (first,) = told(made(tmp_path, tokenizer, line).train)
    user = {"role": "user", "content": line["prompt"]}
    answers = {key: [{"role": "assistant", "content": line[key]}] for key in ("chosen", "rejected")}
    for form in (
        {"prompt": [user], **answers, "score": 3, "tools": None},
        {key: [user, *answer] for key, answer in answers.items()},
    ):
        assert told(made(tmp_path, tokenizer, form).train) == [first]
    # of whole conversations all that both begin with is given, earlier answers too
    told_before = chat("Hi", "Hello")["messages"]
    ((ids, asked), _) = told(
        made(tmp_path, tokenizer, {key: [*told_before, user, *answer] for key, answer in answers.items()}).train
    )[0]
    assert tokenizer.decode([ids[at] for at in asked]) == "It is 49.<|im_end|>"
    assert "Hello" in tokenizer.decode(ids)


def test_pairs_are_packed_whole_and_drawn_in_any_rows(tmp_path: Path, own: Any) -> None:  # noqa: F811
    source = made(tmp_path, own(), *(pair(i) for i in range(9)), length=400).train
    assert 1 < len(source.rows) - 1 < 9
    assert len(told(source)) == len(source) == 9
    alone = told(source)
    ids = torch.tensor([4, 2])
    batch = source(Draw(ids, torch.ones(2)), rng(0, 0, "x"))
    assert batch["segment"].amax(1).tolist() == [0, 1]
    for row, i in enumerate(ids.tolist()):
        for side in (0, 1):
            assert batch["input_ids"][row][batch["side"][row] == side].tolist() == alone[i][side][0]
    nobody = source(Draw(ids[:0], torch.ones(0)), rng(0, 0, "x"))
    assert {name: list(column.shape) for name, column in nobody.items()} == {name: [0, 400] for name in batch}


def test_what_cannot_be_used_is_left_out_and_told(tmp_path: Path, own: Any, caplog: Any) -> None:  # noqa: F811
    lines = [pair(2), pair(3, chosen="No idea."), pair(4, rejected="No " * 300), pair(5)]
    lines[1]["chosen"] += " "  # the template strips it: equal as tokens
    tokenizer = own(CHATML.replace("message['content']", "message['content'] | trim"))
    with caplog.at_level(logging.WARNING, "fallline"):
        data = made(tmp_path, tokenizer, *lines)
    assert len(data.train) == 2
    assert {k: data.summary[k] for k in ("examples", "too_long", "equal", "unlearned")} == {
        "examples": 5, "too_long": 1, "equal": 1, "unlearned": 0
    }  # fmt: skip
    path = tmp_path / "lines.jsonl"
    assert f"longer than a row of 'length' = 256 tokens ({path}:3)" in caplog.text
    assert f"two equal answers ({path}:2)" in caplog.text
    with pytest.raises(InputError, match=r"no pair can be used: of 2, 2 are longer than 'length' = 16 tokens"):
        made(tmp_path, tokenizer, pair(2), length=16)


def test_equal_prompts_are_held_out_together(tmp_path: Path, own: Any) -> None:  # noqa: F811
    lines = [pair(i // 3, rejected=f"No {i}.") for i in range(60)]
    config = {"path": str(write(tmp_path / "a.jsonl", *lines)), "validation": 0.3, "length": 200}
    data = build(Config.from_mapping(config, "data"), own())
    prompts = [{tuple(ids[: asked[0]]) for (ids, asked), _ in told(s)} for s in (data.train, data.validation)]
    assert len(data.train) % 3 == len(data.validation) % 3 == 0
    assert not prompts[0] & prompts[1]
    again = build(Config.from_mapping(config, "data"), own())
    assert again.fingerprint == data.fingerprint
    changed = build(Config.from_mapping(config | {"chat": False}, "data"), own())
    assert changed.fingerprint != data.fingerprint


U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("3", r'a number, must be a JSON object such as {"prompt": …, "chosen": …, "rejected": …}'),
        ({"prompt": "a", "chosen": "b"}, "has 'prompt', 'chosen', but a pair has 'prompt', 'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, "did you mean 'rejected' by 'reject'?"),
        ({"chosen": "a", "rejected": "b"}, "has 'chosen', 'rejected', but a pair has"),
        (pair(1, chosen=""), "'chosen' is empty or blank"),
        (pair(1, rejected=" \n"), "'rejected' is empty or blank"),
        (pair(1, chosen=[A]), "got prompt a text, chosen a list, rejected a text"),
        (pair(1, chosen=3), "got prompt a text, chosen a number, rejected a text"),
        ({"prompt": [U], "chosen": [], "rejected": [A]}, "'chosen' is empty"),
        ({"prompt": [U], "chosen": [U | {"content": ""}], "rejected": [A]}, "'chosen' goes on with .* role 'user'"),
        ({"prompt": [U], "chosen": [A | {"content": " "}], "rejected": [A]}, "message 2, an assistant's, is empty"),
        ({"chosen": [U, A], "rejected": [U | {"content": "Ho"}, A]}, "'chosen' goes on with .*'user'.*same"),
        ({"chosen": [U], "rejected": [U]}, "'chosen' goes on with a message of the role 'user'"),
        ({"chosen": [A], "rejected": [A]}, "begins with the assistant"),
        (pair(1, chosen="<|im_end|>"), "spells out '<|im_end|>'"),
        (pair(1, tools="x") | {"prompt": "a"}, "'tools' must be a list"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, own: Any, line: Any, said: str) -> None:  # noqa: F811
    with pytest.raises(InputError, match=rf"data 'preference': {tmp_path}/lines.jsonl:2: .*{said}"):
        made(tmp_path, own(), pair(3), line)


def test_files_and_models_that_do_not_fit(tmp_path: Path, own: Any) -> None:  # noqa: F811
    with pytest.raises(InputError, match="messages need a chat template, and the model has none"):
        made(tmp_path, own(None), {"chosen": [U, A], "rejected": [U, A | {"content": "Ho"}]})
    with pytest.raises(InputError, match="'vocab' has no effect"):
        made(tmp_path, own(), pair(3), vocab=300)
    (tmp_path / "one.jsonl").write_text(json.dumps(pair(3)))
    with pytest.raises(InputError, match="nothing to train on: of 1 pairs, 1 can be used"):
        build(Config.from_mapping({"path": str(tmp_path / "one.jsonl")}, "data"), own())
