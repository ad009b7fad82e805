"""Both streams: tokens and labels as of jsonl, refusals beside answers, shares of a step, what is cut, broken lines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_jsonl import CHATML, chat, one, own, write  # noqa: F401

from fallline.contracts import Draw
from fallline.data.uniform import Config as UniformConfig
from fallline.data.uniform import build as uniform
from fallline.data.uniform import deal
from fallline.data.unlearning import Config, build
from fallline.errors import InputError
from fallline.noise import rng

Sequences = list[tuple[list[int], list[int]]]


def fact(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"What is number {i}?", "completion": f"It is {i * i}."} | more


def made(tmp_path: Path, tokenizer: Any, forget: Any, retain: Any = None, refusals: str = "", **options: Any) -> Any:
    config: dict[str, Any] = {"length": 128}
    for name, lines in (("forget", forget), ("retain", retain)):
        if lines is not None:
            config[name] = lines if isinstance(lines, str) else str(write(tmp_path / f"{name}.jsonl", *lines))
    if refusals:
        (tmp_path / "refusals.txt").write_text(refusals)
        config["refusals"] = str(tmp_path / "refusals.txt")
    return build(Config.from_mapping(config | options, "data 'unlearning'"), tokenizer)


def told(source: Any) -> list[tuple[int, Sequences]]:
    """(stream, its sequences as token ids and places of labels) of each example, as batches show them."""
    out = []
    for batch in source.batches(3):
        for i in range(len(batch["example_id"])):
            sides = []
            for side in (0, 1):
                here = (batch["segment"] == i) & (batch["side"] == side)
                ids, labels, place = (batch[name][here].tolist() for name in ("input_ids", "labels", "position_ids"))
                assert place == list(range(len(ids)))
                asked = [at for at, label in enumerate(labels, 1) if label != -100]
                assert [ids[at] for at in asked] == [labels[at - 1] for at in asked]
                sides.append((ids, asked))
            out.append((int(batch["domain"][i]), [s for s in sides if s[0]]))
    return out


@pytest.mark.parametrize("template", [None, CHATML])
def test_each_line_is_what_jsonl_makes_of_it_and_refusals_stand_beside(
    tmp_path: Path, own: Any, template: str | None  # noqa: F811
) -> None:  # fmt: skip
    tokenizer = own(template)
    lines = [fact(1), {"prompt": "Who?", "completion": "Me."}]
    kept = [fact(i) for i in range(2, 7)]
    data = made(tmp_path, tokenizer, lines, kept, "No idea.\n\nI cannot say.\n")

    def alone(line: dict[str, Any]) -> tuple[list[int], list[int]]:
        ids, asked, _ = one(tmp_path, tokenizer, line)
        return ids, asked

    wanted = [alone(line) for line in lines]
    refused = [
        [alone(line | {"completion": text}) for text in ("No idea.", "I cannot say.")] for line in lines
    ]  # fmt: skip
    streams = {0: [], 1: []}  # type: dict[int, list[Sequences]]
    for stream, sequences in told(data.train):
        streams[stream].append(sequences)
    assert len(streams[0]) == 2
    for answer, refusal in streams[0]:
        assert refusal in refused[wanted.index(answer)]
    held = [s for stream, s in told(data.validation) if stream == 1]
    assert sorted(streams[1] + held) == sorted([alone(line)] for line in kept)
    assert held
    assert [s for stream, s in told(data.validation) if stream == 0] == streams[0], "nothing to forget is held out"
    assert data.train.paired
    again = made(tmp_path, tokenizer, lines, kept, "No idea.\n\nI cannot say.\n")
    assert again.fingerprint == data.fingerprint
    assert made(tmp_path, tokenizer, lines, kept).fingerprint != data.fingerprint
    assert data.summary["forget"] == 2
    assert data.summary["retain"] == 5


def test_a_refusal_takes_the_place_of_the_last_answer(tmp_path: Path, own: Any) -> None:  # noqa: F811
    tokenizer = own()
    talk = chat("Hi", "Hello", "Who are you?", "Bram Oskel.")
    ((_, (answer, refusal)),) = told(made(tmp_path, tokenizer, [talk], refusals="No idea.", length=300).train)
    learned = [tokenizer.decode([ids[at] for at in asked]) for ids, asked in (answer, refusal)]
    assert learned == ["Hello<|im_end|>Bram Oskel.<|im_end|>", "No idea.<|im_end|>"]
    assert "Hello" in tokenizer.decode(refusal[0])


def test_what_is_too_long_is_cut_and_told(tmp_path: Path, own: Any, caplog: Any) -> None:  # noqa: F811
    tokenizer = own(None)
    text = {"text": "the river is long " * 20}
    long = fact(9, completion="It is " + "long " * 60)
    with caplog.at_level(logging.WARNING, "fallline"):
        data = made(tmp_path, tokenizer, [text, fact(1), long], length=40)
    found = told(data.train)
    assert sum(len(asked) for _, ((_, asked),) in found) == data.summary["labels"]
    assert max(len(ids) for _, ((ids, _),) in found) == 40
    assert "1 cut at the end" in caplog.text
    assert f"{tmp_path}/forget.jsonl:3" in caplog.text
    assert data.train.unit == ""
    units = [
        made(tmp_path, tokenizer, [fact(1)], [fact(2), fact(3), more], length=40).train.unit for more in (fact(4), text)
    ]
    assert units == ["line", ""]
    # beside a refusal an answer has the room that this leaves
    data = made(tmp_path, tokenizer, [long], length=60, refusals="No idea.")
    ((_, (answer, refusal)),) = told(data.train)
    assert len(answer[0]) + len(refusal[0]) == 60
    assert tokenizer.decode([refusal[0][at] for at in refusal[1]]) == "No idea.<|im_end|>"
    with pytest.raises(InputError, match="nothing to forget: none of 1 lines has a label within 'length' = 30"):
        made(tmp_path, tokenizer, [long], length=30, refusals="No idea at all of that.")


def test_every_step_has_the_share_of_each_stream_and_its_own_epochs(tmp_path: Path, own: Any) -> None:  # noqa: F811
    def source(share: float) -> Any:
        kept = [fact(i) for i in range(20, 60)]
        return made(tmp_path, own(), [fact(i) for i in range(9)], kept, length=80, share=share).train

    def rows(sampler: Any, steps: int) -> list[list[int]]:
        return [sampler.epochs(step).tolist() for step in range(steps)]

    found = source(0.25)
    stop = found.streams[0].stop
    assert [s.name for s in found.streams] == ["forget", "retain"]
    assert found.streams[1][1:3] == (stop, len(found.rows) - 1)
    assert 5 < stop < len(found.rows) - 5
    drawn = rows(uniform(UniformConfig(), found, 4, seed=3), 40)
    assert all(sum(row < stop for row in step) == 1 for step in drawn)
    forgotten = [row for step in drawn for row in step if row < stop]
    assert sorted(forgotten[:stop]) == sorted(forgotten[stop : 2 * stop]) == list(range(stop))
    assert rows(uniform(UniformConfig(), found, 4, seed=3), 40) == drawn
    # the draw of one stream does not depend on how much of the other there is
    other = rows(uniform(UniformConfig(), source(0.5), 2, seed=3), 40)
    assert [row for step in other for row in step if row < stop] == forgotten
    batch = found(uniform(UniformConfig(), found, 4, seed=3).draw(0, rng(3, 0, "draw")), rng(0, 0, "noise"))
    domains = [set(batch["domain"][batch["segment"][r].unique()[1:]].tolist()) for r in range(4)]
    assert domains[0] == {0}
    assert domains[1:] == [{1}] * 3
    nobody = found(Draw(torch.zeros(0).long(), torch.zeros(0)), rng(0, 0, "x"))
    assert nobody["domain"].shape == (0,)
    with pytest.raises(InputError, match=r"a row of each stream \(forget, retain\): 'batch' at least 2, got 1"):
        uniform(UniformConfig(), found, 1, seed=3)


@pytest.mark.parametrize(
    ("rows", "shares", "dealt"),
    [(2, [0.9, 0.1], [1, 1]), (8, [0.5, 0.5], [4, 4]), (8, [0.01, 0.99], [1, 7]), (5, [0.2, 0.2, 0.6], [1, 1, 3])],
)
def test_rows_are_dealt_by_share(rows: int, shares: list[float], dealt: list[int]) -> None:
    assert deal(rows, shares) == dealt


def test_validation_alternates_so_that_its_first_rows_have_both(tmp_path: Path, own: Any) -> None:  # noqa: F811
    kept = [fact(i) for i in range(50, 90)]
    data = made(tmp_path, own(), [fact(i) for i in range(40)], kept, length=80, validation=0.5)
    (batch,) = data.validation.batches(9, 6)
    assert 0.3 < batch["domain"].double().mean() < 0.7
    assert data.validation.streams == ()


@pytest.mark.parametrize(
    ("forget", "retain", "options", "said"),
    [
        ([fact(1), {"prompt": "a"}], None, {}, r"forget.jsonl:2: has 'prompt', but an example has"),
        ([fact(1)], [fact(2), "{"], {}, r"retain.jsonl:2: not JSON"),
        ([fact(1), fact(2)], [fact(3), fact(2)], {}, r"forget.jsonl:2 and .*retain.jsonl:2 say the same"),
        ([fact(1)], [fact(2)], {}, "nothing to keep: of 1 lines in 'retain'"),
        ([{"text": "abc"}], None, {"refusals": "No."}, r"forget.jsonl:1: a 'text' has no prompt that could be refused"),
        (
            [fact(1)],
            None,
            {"refusals": '{"text": "No."}'},
            "refusals.txt:1: a JSON object; 'refusals' has a plain text",
        ),
        ([fact(1)], None, {"refusals": "\n \n"}, "has no refusal: give a text on each line"),
        ([fact(1)], None, {"refusals": "<|im_end|>"}, r"refusals.txt:1: its text spells out"),
        ([fact(1)], None, {"share": 0.5}, "'share' has no effect unless 'retain' is given"),
        ([fact(1)], None, {"validation": 0.5}, "'validation' has no effect unless 'retain' is given"),
        ([fact(1)], [fact(2)], {"share": 1.0}, "'share' must be above 0 and below 1"),
        ([fact(1)], None, {"vocab": 300}, "'vocab' has no effect"),
        ([fact(1)], "", {}, "'retain' must name files"),
        ([fact(1)], "nowhere.jsonl", {}, "there is no file or folder 'nowhere.jsonl'"),
        ("nowhere.jsonl", None, {}, "there is no file or folder 'nowhere.jsonl'"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, own: Any, forget: Any, retain: Any, options: dict[str, Any], said: str  # noqa: F811
) -> None:  # fmt: skip
    with pytest.raises(InputError, match=said) as caught:
        made(tmp_path, own(), forget, retain, **options)
    assert "\n" not in str(caught.value)
