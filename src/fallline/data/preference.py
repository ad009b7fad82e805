"""Pairs of answers as JSON Lines: to one prompt, an answer that was chosen and one that was rejected.

    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "Lyon."}
    {"prompt": [{"role": "user", "content": "Hi!"}], "chosen": [{"role": "assistant", "content": "Hello."}], …}
    {"chosen": [{"role": "user", …}, {"role": "assistant", …}], "rejected": [the same, but for what was answered]}

The forms are those of `pairs`. Texts go through the model's chat template as user and assistant, where it has one and
`chat` is not false; elsewhere they are plain text, with the tokenizer's tokens around them as in ``jsonl``. Labels are
the answers' tokens and what ends them.

A pair is one example, both answers with their prompt side by side in one row (`paired`), and is never cut: what does
not fit into a row of `length` tokens is left out, and so is a pair whose answers are the same tokens. Both are told.

Which pairs are held out is decided by a hash of the prompt: answers to one prompt are on the same side.

Cost: everything is read, rendered and tokenized at every start. The prompt is computed twice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..catalog import Card
from ..errors import InputError
from ..noise import key
from ..options import option
from .conversation import Chat
from .dataset import Dataset, check_vocab, padding
from .labelled import LEARNED_UNIT, labelled, learned_from
from .lines import Line, LineOptions, read_examples, some_of
from .paired import PairedSource, pack_pairs
from .pairs import Pair, parse_pair

CARD = Card(
    id="preference",
    kind="data",
    summary="Your own JSON Lines of prompts with a chosen and a rejected answer.",
    needs=("UTF-8 files with a JSON object on each line; messages need a model with a chat template",),
    checked="tokens and labels of each answer are those of jsonl; broken lines; what is left out",
    tags=("files", "local", "own data", "preference", "pairs", "chosen", "rejected", "alignment", "dpo", "chat"),
)

_WHAT = "data 'preference'"

log = logging.getLogger("fallline")


@dataclass(frozen=True, kw_only=True)
class Config(LineOptions):
    """Where the lines are and how they are read."""

    length: int = option(
        1024,
        "tokens of a packed row; both answers of a pair, each with the prompt, must fit into one",
        ge=8,
        source="chosen here: two answers of some 350 English words with a short prompt",
    )


class Encoded(NamedTuple):
    """Pairs as tokens.

    Attributes:
        tokens: [T] uint32. asked: [T] bool, whether a token is a label.
        start, size, second: [pairs] int64, where in `tokens` each begins, how many it has, and how many of them are of
            the chosen answer and its prompt.
        line: [pairs] int64, which line it is of.
        long: lines that do not fit into a row. equal: lines whose answers are the same. unlearned: lines with an answer
            without a label.
        characters: of all lines as the model sees them.
    """

    tokens: NDArray[np.uint32]
    asked: NDArray[np.bool_]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    second: NDArray[np.int64]
    line: NDArray[np.int64]
    long: list[int]
    equal: list[int]
    unlearned: list[int]
    characters: int


def build(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
    """The pairs of the files named by `config.path`, packed whole.

    `summary` counts examples (lines), too_long, equal, unlearned (all left out), characters, tokens, labels,
    vocabulary, train_rows, validation_rows. The fingerprint covers lines, tokens and labels.

    Raises:
        InputError: a path that is not there or names no files; a file without a pair; a line that is no pair, which is
            named; `vocab` given to a model that brings its tokenizer; nothing to train or to validate on.
    """
    check_vocab(config, tokenizer, _WHAT)
    lines = list(_read(config, tokenizer is not None and bool(tokenizer.chat_template)))
    if not lines:
        raise InputError(f"{_WHAT}: the files of 'path' are all empty or blank")
    unit = "line"
    if tokenizer is None:
        answers = (answer for line in lines for answer in (line.example.chosen, line.example.rejected))
        unit, tokenizer = LEARNED_UNIT, learned_from(answers, config.vocab)
    encoded = encode(lines, tokenizer, config.length)
    _warn(lines, encoded, config.length)

    held_out = _held_out(lines, encoded, config)[encoded.line]
    pad = padding(tokenizer)
    train, validation = (_packed(lines, encoded, side, config.length, pad, unit) for side in (~held_out, held_out))
    for name, source in (("train on", train), ("validate on", validation)):
        if len(source) == 0:
            raise InputError(
                f"{_WHAT}: there is nothing to {name}: of {len(lines)} pairs, {len(encoded.line)} can be used, and "
                "those with equal prompts are trained on or held out together; give more prompts, a larger 'length' "
                f"(now {config.length}), or a 'validation_path'"
            )
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line.example.id} {line.held_out}\n".encode())
    for array in (encoded.tokens, encoded.asked, encoded.second):
        digest.update(array.tobytes())
    summary = {
        "examples": len(lines),
        "too_long": len(encoded.long),
        "equal": len(encoded.equal),
        "unlearned": len(encoded.unlearned),
        "characters": encoded.characters,
        "tokens": len(encoded.tokens),
        "labels": int(encoded.asked.sum()),
        "vocabulary": len(tokenizer),
        "train_rows": len(train.rows) - 1,
        "validation_rows": len(validation.rows) - 1,
    }
    return Dataset(train, validation, tokenizer, digest.hexdigest(), summary)


def encode(lines: Sequence[Line[Pair]], tokenizer: PreTrainedTokenizerBase, length: int) -> Encoded:
    """Pairs as tokens, at most `length` of each.

    Raises:
        InputError: a line that cannot be rendered, which is named; no pair can be used.
    """
    tokens: list[NDArray[np.uint32]] = []
    asked: list[NDArray[np.bool_]] = []
    pairs: list[tuple[int, int, int, int]] = []  # start, size, second, line
    long, equal, unlearned, total, characters = [], [], [], 0, 0
    answers = [(line.where, answer) for line in lines for answer in (line.example.chosen, line.example.rejected)]
    found = labelled(answers, tokenizer, _WHAT)
    for number, (a, b) in enumerate(zip(found, found, strict=True)):  # two at a time
        characters += a.characters + b.characters
        size = len(a.ids) + len(b.ids)
        for answer in (a, b):
            answer.asked[:1] = False  # nothing comes before it
        if not (a.asked.any() and b.asked.any()):
            unlearned.append(number)
        elif size > length:
            long.append(number)
        elif np.array_equal(a.ids, b.ids):
            equal.append(number)
        else:
            pairs.append((total, size, len(a.ids), number))
            tokens += [a.ids, b.ids]
            asked += [a.asked, b.asked]
            total += size
    if not pairs:
        raise InputError(
            f"{_WHAT}: no pair can be used: of {len(lines)}, {len(long)} are longer than 'length' = {length} tokens, "
            f"{len(equal)} have two equal answers, {len(unlearned)} an answer without a label"
        )
    start, size, second, line_of = np.array(pairs, np.int64).T
    return Encoded(
        np.concatenate(tokens), np.concatenate(asked), start, size, second, line_of, long, equal, unlearned, characters
    )


def _read(config: Config, template: bool) -> Sequence[Line[Pair]]:
    """The pairs of all files; `template`: whether the tokenizer has a chat template."""

    def pair(line: str) -> Pair:
        found = parse_pair(line, config.chat and template)
        if isinstance(found.chosen, Chat) and not template:
            raise InputError(
                "messages need a chat template, and the model has none; take a model with one, or give 'prompt', "
                "'chosen' and 'rejected' as texts"
            )
        return found

    return list(read_examples(config, _WHAT, pair))


def _held_out(lines: Sequence[Line[Pair]], encoded: Encoded, config: Config) -> NDArray[np.bool_]:
    """[lines], of few at least one that is used."""
    if config.validation_path is not None:
        return np.array([line.held_out for line in lines])
    side = np.array([key(0, 0, f"data/side/{line.example.prompt}") for line in lines])
    return side <= max(config.validation * 2.0**63, side[encoded.line].min())


def _packed(
    lines: Sequence[Line[Pair]], encoded: Encoded, side: NDArray[np.bool_], length: int, pad: int, unit: str
) -> PairedSource:
    chosen = np.flatnonzero(side)
    order = np.array([key(0, 0, f"data/order/{lines[encoded.line[i]].example.id}") for i in chosen], np.int64)
    start, size, second = encoded.start[chosen], encoded.size[chosen], encoded.second[chosen]
    return pack_pairs(encoded.tokens, encoded.asked, start, size, second, order, length, pad, unit)


def _warn(lines: Sequence[Line[Pair]], encoded: Encoded, length: int) -> None:
    told = [
        f"{len(which)} {what} ({some_of(lines, which)})"
        for which, what in (
            (encoded.long, f"longer than a row of 'length' = {length} tokens"),
            (encoded.equal, "with two equal answers"),
            (encoded.unlearned, "with an answer without a label"),
        )
        if which
    ]
    if told:
        log.warning("%s: of %d pairs, left out: %s", _WHAT, len(lines), "; ".join(told))
