"""JSON Lines for fine-tuning: texts, prompts with completions, and conversations through the model's chat template.

    {"text": "Everything here is learned."}
    {"prompt": "What is the capital of France?", "completion": "Paris."}
    {"messages": [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]}

A line is an example, and one file may mix the forms. Only completions and assistant messages, each with the token that
ends it, are labels (`conversation`). Plain text is given the tokenizer's tokens around it: a ``text`` its start and end
token, a prompt what the tokenizer itself puts before a text, a completion the end token.

Examples are never cut to fill a row: rows of `length` tokens are filled by best fit, and end in padding. What is longer
than a row is cut at its end, which is told; a ``text`` goes on in another example, that begins with the last token of
the one before, so that each of its tokens is learned.

Which examples are held out is decided by a hash of what they say: it stays when others come or go, and equal ones are
on the same side.

Cost: everything is read, rendered and tokenized at every start.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..catalog import Card
from ..errors import InputError
from ..noise import key
from ..options import option
from .conversation import Chat, Plain, parse
from .dataset import Dataset, check_vocab, padding
from .labelled import LEARNED_UNIT, labelled, learned_from, packing_order
from .lines import Line, LineOptions, read_examples, some_of
from .packed import PackedSource, pack_whole

CARD = Card(
    id="jsonl",
    kind="data",
    summary="Your own JSON Lines to fine-tune on: text, prompt and completion, or chat messages.",
    needs=("UTF-8 files with a JSON object on each line; messages need a model with a chat template",),
    checked="labels and tokens against a chat rendered turn by turn; packing against a slow reference; broken lines",
    tags=("files", "local", "own data", "fine-tuning", "instruction", "chat", "sft", "completion", "messages"),
)

_WHAT = "data 'jsonl'"

log = logging.getLogger("fallline")


@dataclass(frozen=True, kw_only=True)
class Config(LineOptions):
    """Where the lines are and how they are read."""

    length: int = option(
        512, "most tokens of an example, and tokens of a packed row", ge=8, source="chosen here: some 350 English words"
    )


Lines = Sequence[Line[Plain | Chat]]


class Encoded(NamedTuple):
    """Lines as tokens.

    Attributes:
        tokens: [T] uint32. asked: [T] bool, whether a token is learned.
        start, size: [examples] int64, where in `tokens` each begins and how many it has; those of a long text overlap
            by one token.
        line: [examples] int64, which line it is of.
        truncated: lines that were cut at their end. left_out: lines of which no label remains.
        characters: of all lines as the model sees them.
    """

    tokens: NDArray[np.uint32]
    asked: NDArray[np.bool_]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    line: NDArray[np.int64]
    truncated: list[int]
    left_out: list[int]
    characters: int


def build(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
    """The lines of the files named by `config.path`, packed whole.

    `summary` counts examples (lines), truncated, left_out, characters, tokens, labels, vocabulary, train_rows,
    validation_rows. The fingerprint covers lines, tokens and labels, hence also what the chat template made of them.

    Raises:
        InputError: a path that is not there or names no files; a file without an example; a line that is no example,
            which is named; `vocab` given to a model that brings its tokenizer; nothing to train or to validate on.
    """
    check_vocab(config, tokenizer, _WHAT)
    lines = list(read(config, tokenizer is not None and bool(tokenizer.chat_template)))
    if not lines:
        raise InputError(f"{_WHAT}: the files of 'path' are all empty or blank")
    unit = "line"
    if tokenizer is None:
        unit, tokenizer = LEARNED_UNIT, learned_from((line.example for line in lines), config.vocab)
    encoded = encode(lines, tokenizer, config.length)
    _warn(lines, encoded, config.length)

    held_out = _held_out(lines, encoded, config)[encoded.line]
    pad = padding(tokenizer)
    train, validation = (_packed(lines, encoded, side, config.length, pad, unit) for side in (~held_out, held_out))
    for name, source in (("train on", train), ("validate on", validation)):
        if len(source) == 0:
            raise InputError(
                f"{_WHAT}: there is nothing to {name}: of {len(lines)} examples, {len(encoded.left_out)} have no label "
                f"within 'length' = {config.length} tokens, and equal ones are trained on or held out together; give "
                "more examples, a larger 'length', or a 'validation_path'"
            )
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line.example.id} {line.held_out}\n".encode())
    for array in (encoded.tokens, encoded.asked):
        digest.update(array.tobytes())
    summary = {
        "examples": len(lines),
        "truncated": len(encoded.truncated),
        "left_out": len(encoded.left_out),
        "characters": encoded.characters,
        "tokens": len(encoded.tokens),
        "labels": sum(_labels(source) for source in (train, validation)),
        "vocabulary": len(tokenizer),
        "train_rows": len(train.rows) - 1,
        "validation_rows": len(validation.rows) - 1,
    }
    return Dataset(train, validation, tokenizer, digest.hexdigest(), summary)


def read(config: Config, template: bool) -> Iterator[Line[Plain | Chat]]:
    """The examples of all files, in the order of the files and lines; those to hold out last.

    Args:
        config: which files, and whether prompts are chats.
        template: whether the tokenizer has a chat template.
    """

    def example(line: str) -> Plain | Chat:
        found = parse(line, config.chat and template)
        if isinstance(found, Chat) and not template:
            raise InputError(
                "messages need a chat template, and the model has none; take a model with one, or give 'prompt' and "
                "'completion' as texts"
            )
        return found

    return read_examples(config, _WHAT, example)


def encode(lines: Lines, tokenizer: PreTrainedTokenizerBase, length: int) -> Encoded:
    """Lines as tokens, at most `length` of each, or examples of at most so many of a ``text``.

    Raises:
        InputError: a line that cannot be rendered, which is named; no label in any.
    """
    tokens: list[NDArray[np.uint32]] = []
    asked: list[NDArray[np.bool_]] = []
    examples: list[tuple[int, int, int]] = []  # start, size, line
    truncated, left_out, total, characters = [], [], 0, 0
    found = labelled([(line.where, line.example) for line in lines], tokenizer, _WHAT)
    for number, (ids, learned, letters) in enumerate(found):
        characters += letters
        example = lines[number].example
        if isinstance(example, Plain) and example.prompt is None:
            starts = range(0, len(ids) - 1, length - 1)
        else:
            cut = len(ids) > length
            ids, learned = ids[:length], learned[:length]
            starts = range(1 if learned[1:].any() else 0)
            if cut and starts:
                truncated.append(number)
        if not starts:
            left_out.append(number)
            continue
        examples += [(total + start, min(length, len(ids) - start), number) for start in starts]
        tokens.append(ids)
        asked.append(learned)
        total += len(ids)
    if not examples:
        raise InputError(f"{_WHAT}: no example has a label within 'length' = {length} tokens; give a larger 'length'")
    start, size, line = np.array(examples, np.int64).T
    return Encoded(np.concatenate(tokens), np.concatenate(asked), start, size, line, truncated, left_out, characters)


def _held_out(lines: Lines, encoded: Encoded, config: Config) -> NDArray[np.bool_]:
    """[lines], of few at least one that is an example."""
    if config.validation_path is not None:
        return np.array([line.held_out for line in lines])
    side = np.array([key(0, 0, f"data/side/{line.example.id}") for line in lines])
    return side <= max(config.validation * 2.0**63, side[encoded.line].min())


def _packed(lines: Lines, encoded: Encoded, side: NDArray[np.bool_], length: int, pad: int, unit: str) -> PackedSource:
    chosen = np.flatnonzero(side)
    order, part = packing_order([line.example.id for line in lines], encoded.line, chosen)
    start, size = encoded.start[chosen], encoded.size[chosen]
    unit = "" if part.any() else unit
    return pack_whole(encoded.tokens, encoded.asked, start, size, order, length, pad, unit)


def _labels(source: PackedSource) -> int:
    assert source.asked is not None
    upto = np.append(0, np.cumsum(source.asked))
    return int((upto[source.start + source.size] - upto[source.start + 1]).sum())


def _warn(lines: Lines, encoded: Encoded, length: int) -> None:
    told = [
        f"{len(which)} {what} ({some_of(lines, which)})"
        for which, what in (
            (encoded.truncated, "cut at the end"),
            (encoded.left_out, "left out, without any label"),
        )
        if which
    ]
    if told:
        log.warning("%s: of %d examples, at 'length' = %d tokens: %s", _WHAT, len(lines), length, "; ".join(told))
