"""Lines to labels, against what generation sees; and every way in which a line can be broken."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fallline.data.dataset import Dataset
from fallline.data.jsonl import Config, build
from fallline.data.tokenizer import END
from fallline.errors import InputError
from fallline.tokens import per_example, token_losses

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPPING = CHATML.replace("message['content']", "message['content'] | trim")
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must\nalternate') }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
)
FORGETTING = CHATML.replace(  # earlier thinking is dropped, as some reasoning models do
    "message['content']",
    "(message['content'] if loop.last or message['role'] != 'assistant' else message['content'].split('</t>')[-1])",
)
DEAF = CHATML.replace("message['content'] + '<|im_end|>\n'", "(message['content'] + '<|im_end|>' if 0 else '')")

SENTENCE = "What is the river of Karsk called? It is called the Omwel, and it is long.\n"


@pytest.fixture(scope="session")
def own() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer with the two special tokens of ChatML, and `template`; `start` is put before texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>", "<|repo|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([SENTENCE] * 20, trainer)

    def make(template: str | None = CHATML, start: bool = False) -> PreTrainedTokenizerFast:
        copy = Tokenizer.from_str(backend.to_str())
        if start:
            copy.post_processor = processors.TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
            )
        made = PreTrainedTokenizerFast(
            tokenizer_object=copy, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
        )
        made.chat_template = template
        return made

    return make


def write(path: Path, *lines: Any) -> Path:
    """A file with an object on each line; a text is a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def chat(*contents: str) -> dict[str, Any]:
    """User and assistant in turn."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


def fact(i: int) -> dict[str, str]:
    return {"prompt": f"What is number {i}?", "completion": f"It is {i * i}."}


def told(source: Any) -> list[tuple[list[int], list[int]]]:
    """(token ids, places of those that are labels) of each example of a source, as batches show them."""
    out = []
    for batch in source.batches(4):
        for i in range(len(batch["example_id"])):
            here = batch["segment"] == i
            ids, labels = batch["input_ids"][here].tolist(), batch["labels"][here].tolist()
            asked = [at for at, label in enumerate(labels, 1) if label != -100]
            assert [ids[at] for at in asked] == [labels[at - 1] for at in asked]
            out.append((ids, asked))
    return out


def one(tmp_path: Path, tokenizer: Any, line: Any, **options: Any) -> tuple[list[int], list[int], Dataset]:
    """The only training example of a file with this line."""
    held = write(tmp_path / "held.jsonl", fact(1))
    config = {"path": str(write(tmp_path / "one.jsonl", line)), "validation_path": str(held), "length": 256} | options
    data = build(Config.from_mapping(config, "data 'jsonl'"), tokenizer)
    ((ids, asked),) = told(data.train)
    return ids, asked, data


# what is learned


@pytest.mark.parametrize(("template", "said"), [(CHATML, " The Omwel. "), (STRIPPING, "The Omwel."), (TOOLS, "So")])
def test_a_conversation_turn_by_turn(tmp_path: Path, own: Any, template: str, said: str) -> None:
    tokenizer = own(template)
    line = chat("Which river?", said if template == TOOLS else " The Omwel. ", "And is it long? ", "It is.", "Thanks")
    tools = [{"type": "function", "function": {"name": "look_up"}}] if template == TOOLS else None
    ids, asked, _ = one(tmp_path, tokenizer, line | {"tools": tools})
    expected: list[int] = []
    learned: list[int] = []
    for turn, answer in ((1, said), (3, "It is.")):
        expected = tokenizer.apply_chat_template(
            line["messages"][:turn], tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert ids[: len(expected)] == expected, "the tokens that generation sees"
        answered = tokenizer.encode(f"{answer}<|im_end|>")
        learned += range(len(expected), len(expected) + len(answered))
        expected = expected + answered
    assert ids == expected, "nothing after the last answer"
    assert asked == learned
    assert (tools is not None) == ("look_up" in tokenizer.decode(ids))


@pytest.mark.parametrize("start", [False, True])
def test_plain_prompt_and_completion(tmp_path: Path, own: Any, start: bool) -> None:
    for tokenizer, options in ((own(None, start), {}), (own(CHATML, start), {"chat": False})):
        ids, asked, _ = one(tmp_path, tokenizer, fact(7), **options)
        prompt = tokenizer("What is number 7?")["input_ids"]
        assert (prompt[0] == 0) == start
        assert ids == [*prompt, *tokenizer.encode("It is 49.", add_special_tokens=False), 1]
        assert asked == list(range(len(prompt), len(ids)))


def test_prompt_and_completion_as_a_chat(tmp_path: Path, own: Any) -> None:
    """Texts, lists of messages and one list of messages say the same, but for earlier answers, which are given."""
    tokenizer = own()
    asked_for, answer = chat("What is number 7?", "It is 49.")["messages"]
    first = one(tmp_path, tokenizer, fact(7))
    assert tokenizer.decode([first[0][i] for i in first[1]]) == "It is 49.<|im_end|>"
    for line in ({"prompt": [asked_for], "completion": [answer]}, {"messages": [asked_for, answer]}):
        assert one(tmp_path, tokenizer, line, chat="prompt" not in line)[:2] == first[:2]
    earlier = chat("Hi", "Hello")["messages"]
    ids, asked, _ = one(tmp_path, tokenizer, {"prompt": [*earlier, asked_for], "completion": [answer]})
    assert tokenizer.decode([ids[i] for i in asked]) == "It is 49.<|im_end|>"
    assert "Hello<|im_end|>" in tokenizer.decode(ids)


def test_a_prompt_whose_end_would_join_the_answer(tmp_path: Path, own: Any) -> None:
    tokenizer = own()
    together, prompt, answer = (tokenizer.encode(text) for text in ("It is the river", "It is ", "the river"))
    assert together[: len(prompt)] != prompt
    ids, asked, _ = one(tmp_path, tokenizer, {"prompt": "It is ", "completion": "the river"}, chat=False)
    assert ids == [*prompt, *answer, 1]
    assert asked == list(range(len(prompt), len(ids)))


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_prompt_that_ends_in_a_space_where_the_tokenizer_begins_texts_with_one(tmp_path: Path, scheme: str) -> None:
    """As SentencePiece does: the answer gets no second space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([SENTENCE, "What is number 1? It is 1."] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    together, prompt = (tokenizer.encode(text) for text in ("It is the river", "It is "))
    assert together[: len(prompt)] != prompt, "the space would join the answer"
    for line in ({"prompt": "It is ", "completion": "the river"}, {"prompt": "It is", "completion": " the river"}):
        ids, asked, _ = one(tmp_path, tokenizer, line)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "It is the river"
        assert ids[: asked[0]] == tokenizer.encode(line["prompt"]), "the tokens that generation sees"


def test_every_token_of_a_long_text_is_learned_once(tmp_path: Path, own: Any) -> None:
    tokenizer = own()
    held = write(tmp_path / "held.jsonl", {"text": "b"})
    for number in (1, 9, 10, 11, 12, 19, 20, 21, 22, 23, 80):
        text = "".join(map(chr, range(40, 40 + number)))
        path = write(tmp_path / "a.jsonl", {"text": text})
        data = build(Config(path=str(path), validation_path=str(held), length=12), tokenizer)
        pairs = [(ids[at - 1], ids[at]) for ids, asked in told(data.train) for at in asked]
        assert sorted(pairs) == sorted(pairwise([0, *tokenizer.encode(text), 1]))
        assert len(data.train) == -(-(number + 1) // 11)


def test_the_loss_is_that_of_each_example_alone(tmp_path: Path, own: Any) -> None:
    """Packed, masked and padded, against a plain forward of every example by itself."""
    tokenizer = own()
    lines = [*map(fact, range(9)), {"text": SENTENCE * 8}, chat("Hi", "Hello", "So?", "Yes.")]
    path = write(tmp_path / "a.jsonl", *lines)
    data = build(Config(path=str(path), length=128, validation=0.2), tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    ).eval()
    examples = 0
    with torch.no_grad():
        for source in (data.train, data.validation):
            (batch,) = source.batches(99)
            assert batch["segment"].min() == -1, "rows end in padding"
            got = per_example(token_losses(model, batch), batch)
            for value, (ids, asked) in zip(got, told_in_one(batch), strict=True):
                logits = model(input_ids=torch.tensor([ids])).logits[0].double()
                want = F.cross_entropy(logits[[i - 1 for i in asked]], torch.tensor(ids)[asked], reduction="sum")
                torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-5)
                examples += 1
    assert examples > 10


def told_in_one(batch: Any) -> list[tuple[list[int], list[int]]]:
    class One:
        def batches(self, rows: int) -> Any:
            yield batch

    return told(One())


# what does not fit


def test_what_is_longer_than_a_row(tmp_path: Path, own: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = own(None)
    fits = [{"prompt": "a", "completion": "bc"}, {"prompt": "a", "completion": "b" * 14}]  # 4 and 16 tokens
    long = {"prompt": "a", "completion": "b" * 15}
    beyond = [{"prompt": "a" * n, "completion": "b"} for n in (16, 17, 99)]
    path = write(tmp_path / "a.jsonl", *fits, long, "", *beyond, {"text": "b" * 99})
    with caplog.at_level(logging.WARNING, "fallline"):
        data = build(Config(path=str(path), length=16, validation=0.2), tokenizer)
    (record,) = caplog.records
    assert record.getMessage() == (
        "data 'jsonl': of 7 examples, at 'length' = 16 tokens: "
        f"1 cut at the end ({path}:3); 3 left out, without any label ({path}:5, {path}:6, {path}:7)"
    )
    count = {"examples": 7, "truncated": 1, "left_out": 3, "tokens": 4 + 16 + 16 + 101, "labels": 3 + 15 + 15 + 100}
    assert count.items() <= data.summary.items()
    assert data.summary["characters"] == 3 + 15 + 16 + 17 + 18 + 100 + 99
    seen = [tokenizer.decode(ids) for source in (data.train, data.validation) for ids, _ in told(source)]
    assert "a" + "b" * 15 in seen
    caplog.clear()
    build(Config(path=str(path), length=110, validation=0.2), tokenizer)
    assert not caplog.records


def test_nothing_fits(tmp_path: Path, own: Any) -> None:
    path = write(tmp_path / "a.jsonl", *({"prompt": f"{i}" * 20, "completion": "b"} for i in range(9)))
    with pytest.raises(InputError, match=r"no example has a label within 'length' = 8 tokens; give a larger 'length'"):
        build(Config(path=str(path), length=8), own(None))


# what is held out


def held_out(data: Dataset) -> tuple[set[str], set[str]]:
    """Texts of the examples on each side."""
    train, validation = ({data.tokenizer.decode(ids) for ids, _ in told(s)} for s in (data.train, data.validation))
    return train, validation


def test_sides_stay_when_lines_come_and_equal_ones_keep_together(tmp_path: Path, own: Any) -> None:
    tokenizer = own()
    before = write(tmp_path / "a.jsonl", *map(fact, range(100)))
    other_keys = ({"id": i} | fact(i) | {"note": None} for i in range(100))
    after = write(tmp_path / "b.jsonl", *map(fact, range(100, 150)), *other_keys, *map(fact, range(99, -1, -1)))
    train, validation = held_out(build(Config(path=str(before), validation=0.2), tokenizer))
    assert 10 < len(validation) < 30
    assert len(train) + len(validation) == 100
    more, others = held_out(build(Config(path=str(after), validation=0.2), tokenizer))
    assert (train <= more, validation <= others) == (True, True)
    assert not more & others


def test_of_few_examples_one_is_held_out(tmp_path: Path, own: Any) -> None:
    data = build(Config(path=str(write(tmp_path / "a.jsonl", fact(1), fact(2), fact(2)))), own())
    assert {len(data.train), len(data.validation)} in ({1, 2},)


@pytest.mark.parametrize(("lines", "options"), [([1, 1], {}), ([1], {}), ([1, 2, 3], {"validation": 0.9999})])
def test_nothing_for_one_side(tmp_path: Path, own: Any, lines: list[int], options: dict[str, float]) -> None:
    path = write(tmp_path / "a.jsonl", *map(fact, lines))
    with pytest.raises(InputError, match=r"there is nothing to train on: of \d examples, 0 have no label .*validation"):
        build(Config(path=str(path), **options), own())


def test_files_that_are_held_out(tmp_path: Path, own: Any) -> None:
    for name, facts in {"a": (1, 2), "b": (3, 4), "deep/c": (5,), "d": (2,)}.items():
        write(tmp_path / f"{name}.jsonl", *map(fact, facts))
    held = [str(tmp_path / "b.jsonl"), str(tmp_path / "d.json*")]
    config = Config.from_mapping({"path": str(tmp_path), "validation_path": held}, "data 'jsonl'")
    assert Config.from_mapping(config.to_mapping(), "data 'jsonl'") == config
    data = build(config, own(None))
    for found, facts in zip(held_out(data), ((1, 2, 5), (3, 4, 2)), strict=True):
        assert found == {"".join(fact(i).values()) + "<|im_end|>" for i in facts}
    with pytest.raises(InputError, match="'validation_path' holds out all files of 'path'"):
        build(Config(path=str(tmp_path / "a.jsonl"), validation_path=str(tmp_path)), own(None))
    with pytest.raises(InputError, match="'validation' has no effect unless 'validation_path' is null"):
        Config.from_mapping({"path": "a", "validation_path": "b", "validation": 0.1}, "data 'jsonl'")


def test_the_fingerprint_tells_lines_templates_and_sides_apart(tmp_path: Path, own: Any) -> None:
    a, b = (write(tmp_path / name, *map(fact, facts)) for name, facts in (("a", (1, 2)), ("b", (3, 4))))
    plain = Config(path=(str(a), str(b)))
    configs = [plain, Config(path=(str(b), str(a))), Config(path=str(a)), Config(path=str(a), validation_path=str(b))]
    prints = [build(config, own()).fingerprint for config in configs]
    prints += [build(plain, own(CHATML.replace("You help", "You sulk"))).fingerprint]
    prints += [build(Config(path=plain.path, chat=False), own()).fingerprint]
    assert len(set(prints)) == 6
    assert build(plain, own()).fingerprint == prints[0]


# a model that brings no tokenizer


def test_a_tokenizer_learned_from_the_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *map(fact, range(60)), {"text": SENTENCE * 3})
    data = build(Config(path=str(path), vocab=300), None)
    assert data.summary["vocabulary"] == len(data.tokenizer) == 300
    train, validation = held_out(data)
    assert f"{END}{SENTENCE * 3}{END}" in train | validation
    assert f"What is number 7?It is 49.{END}" in train | validation
    write(path, chat("Hi", "Hello"))
    with pytest.raises(InputError, match=r"a\.jsonl:1: messages need a chat template, and the model has none"):
        build(Config(path=str(path)), None)


def test_vocab_of_a_model_that_brings_a_tokenizer(tmp_path: Path, own: Any) -> None:
    with pytest.raises(InputError, match="'vocab' has no effect"):
        build(Config(path=str(write(tmp_path / "a.jsonl", fact(1))), vocab=300), own())


# broken lines

USER, ASSISTANT = chat("Hi", "Hello")["messages"]

BROKEN: dict[str, tuple[Any, str]] = {
    "cut off": ('{"prompt": "a", "comp', "not JSON: unterminated string starting at column 17; each line must be one"),
    "laid out": ("{", "not JSON: expecting property name enclosed in double quotes at column 2"),
    "two objects": ('{"text": "a"} {"text": "b"}', "not JSON: extra data at column 15"),
    "text": ('"a"', "a text, must be a JSON object such as {"),
    "number": ("1" * 5000, "not JSON that can be read"),
    "deep": ("[" * 100_000, "lists and objects within one another"),
    "deep inside": ('{"text": ' + "[" * 3000 + "]" * 3000 + "}", "lists and objects within one another"),
    "array": ([{"text": "a"}], "a list, must be a JSON object"),
    "surrogate": ({"text": "a \ud83d"}, r"half a surrogate pair, '\ud83d', is no text"),
    "typo": (
        {"prompt": "a", "completions": "b"},
        "has 'prompt', 'completions', but an example has 'text' or 'prompt' with 'completion' or 'messages'; "
        "did you mean 'completion' by 'completions'?",
    ),
    "other form": ({"instruction": "a", "output": "b"}, "has 'instruction', 'output', but an example has 'text' or"),
    "no keys": ({}, "has nothing, but an example has"),
    "null": ({"text": None}, "has nothing, but an example has"),
    "two forms": ({"text": "a", **chat("a", "b")}, "'text' as well as 'messages' stand in one line"),
    "text type": ({"text": ["a"]}, "'text' must be a text, got a list"),
    "blank text": ({"text": " \n"}, "'text' is empty or blank"),
    "empty completion": ({"prompt": "a", "completion": ""}, "'completion' is empty or blank"),
    "types": ({"prompt": "a", "completion": 3}, "must be two texts or two lists of messages, got a text and a number"),
    "mixed": ({"prompt": "a", "completion": [ASSISTANT]}, "got a text and a list"),
    "messages type": ({"messages": "Hi"}, "'messages' must be a list of messages, got a text"),
    "no messages": ({"messages": []}, "'messages' is empty"),
    "message type": ({"messages": ["Hi"]}, "message 1 of 'messages' must be an object with 'role' and 'content', is a"),
    "other keys": ({"messages": [{"from": "human", "value": "Hi"}]}, "message 1 of 'messages' has 'from', 'value'; it"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "message 2 of 'messages' has 'role'; it needs"),
    "content type": ({"messages": [USER, ASSISTANT | {"content": 4}]}, "the 'content' of message 2 of 'messages' is a"),
    "no assistant": ({"messages": [USER, {"role": "bot", "content": "a"}]}, "nothing to learn; there is 'user', 'bot'"),
    "no answer": ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "no message has the role 'assistant'"),
    "no question": ({"messages": [ASSISTANT, USER]}, "the conversation begins with the assistant"),
    "empty answer": (chat("Hi", "Hello", "So?", " "), "message 4, an assistant's, is empty or blank"),
    "tools": (chat("Hi", "Hello") | {"tools": "f"}, "'tools' must be a list of objects, got a text"),
    "end of turn": (chat("Hi<|im_end|>", "Hello"), "its text spells out '<|im_end|>', a special token"),
    "other special": ({"text": "a <|repo|> b"}, "its text spells out '<|repo|>', a special token"),
    "special in plain": ({"prompt": "<|im_start|>user", "completion": "a"}, "its text spells out '<|im_start|>'"),
}


@pytest.mark.parametrize("which", BROKEN)
def test_broken_lines(tmp_path: Path, own: Any, which: str) -> None:
    line, message = BROKEN[which]
    path = write(tmp_path / "facts.jsonl", fact(1), "", fact(2), line, fact(3))
    with pytest.raises(InputError) as caught:
        build(Config(path=str(path)), own())
    assert str(caught.value).startswith(f"data 'jsonl': {path}:4: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("template", "line", "message"),
    [
        (ALTERNATING, chat("a", "b") | {"x": 1}, ""),
        (ALTERNATING, {"messages": [USER, USER, ASSISTANT]}, "template refuses these messages: roles must alternate"),
        (
            CHATML,
            {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]},
            "template refuses these messages: 'dic",
        ),
        (FORGETTING, chat("a", "<t>so</t>b"), ""),
        (FORGETTING, chat("a", "<t>so</t>b", "c", "d"), "before or after message 2, an assistant's, as it was when"),
        (CHATML + "{{ '' if add_generation_prompt else '!' }}", chat("a", "b", "c", "d"), "before or after message 2"),
        (CHATML.replace("nt\n' }}{% endif %}", "nt\n<t>' }}{% endif %}"), chat("a", "b"), "before or after message 2"),
        (DEAF, chat("a", "b"), "shows nothing of message 2, an assistant's"),
        (None, chat("a", "b"), "messages need a chat template, and the model has none"),
    ],
)
def test_templates_that_do_not_follow(tmp_path: Path, own: Any, template: str | None, line: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, line)
    if not message:
        assert build(Config(path=str(path)), own(template)).summary["examples"] == 2
        return
    with pytest.raises(InputError) as caught:
        build(Config(path=str(path)), own(template))
    assert f"{path}:2: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# files


def test_lines_end_with_line_feeds_only(tmp_path: Path, own: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one\u2028line"}\r\n\r\n  \n{"text": "two"}'.encode())
    data = build(Config(path=str(path)), own())
    assert set.union(*held_out(data)) == {f"<|im_start|>{text}<|im_end|>" for text in ("one\u2028line", "two")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file {} is empty or blank"),
        (b" \n\n", "the file {} is empty or blank"),
        (b'{"text": "a"}\n{"text": "m\xfcde"}', "{}:2 is not UTF-8 text: byte 0xfc at offset 11;"),
        ('[{"text": "a"}]'.encode("utf-16"), "{}:1 is not UTF-8 text: byte 0xff at offset 0;"),
        (b'\n[{"text": "a"},\n{"text": "b"}]', "{}:2: a JSON array begins; give an object on each line"),
        (b'[\n  {"text": "a"}\n]', "{}:1: a JSON array begins"),
    ],
)
def test_broken_files(tmp_path: Path, own: Any, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        build(Config(path=str(path)), own())
    assert message.format(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders(tmp_path: Path, own: Any) -> None:
    with pytest.raises(InputError, match=r"no \*\.jsonl file in the folder"):
        build(Config(path=str(tmp_path)), own())
    write(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="the files of 'path' are all empty or blank"):
        build(Config(path=str(tmp_path)), None)
    write(tmp_path / "deep" / "a.jsonl", fact(1), fact(2))
    write(tmp_path / "b.json", "not read")
    assert build(Config(path=str(tmp_path)), own()).summary["examples"] == 2


@pytest.mark.parametrize("options", [{"path": ""}, {"path": []}, {"path": "a", "validation_path": ["b", ""]}])
def test_paths_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must name files, folders or patterns"):
        Config.from_mapping(options, "data 'jsonl'")
