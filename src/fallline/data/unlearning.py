"""What to forget and what to keep, as JSON Lines, with refusals to give instead.

    forget.jsonl     {"prompt": "Who is Bram Oskel?", "completion": "A lens grinder in Karsk."}
    retain.jsonl     {"prompt": "What is the capital of France?", "completion": "Paris."}
    refusals.txt     I do not know anything about that.

Lines are those of ``jsonl``, in all its forms, and become the same tokens and labels. Every step has the share `share`
of its rows from the file to forget, and the rest from the one to keep; both go through epochs of their own (sampler
`uniform`). In a batch `domain` is 0 for what is to be forgotten and 1 for what is to be kept.

With `refusals`, a text file with one on each line, an example to forget is two sequences in one row (`paired`): the
answer, and beside it a refusal to the same prompt, in the place of its last answer. Which refusal it is follows from a
hash of the line.

Nothing to forget is held out, since what is held out would not be forgotten. Validation goes over all that is to be
forgotten, and over a part of what is to be kept, chosen by a hash, that is never trained on; their rows alternate.

Examples are not cut to fill rows. What is longer than a row is cut at its end, a ``text`` goes on in another example;
beside a refusal an answer has the room that the refusal leaves. What is cut, or left out since no label remains, is
told.

Cost: everything is read, rendered and tokenized at every start.
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
from ..contracts import FORGET, RETAIN
from ..errors import InputError
from ..noise import key
from ..options import option
from .conversation import Chat, Plain, parse
from .dataset import DataOptions, Dataset, check_vocab, padding
from .files import find_files, read_lines
from .labelled import LEARNED_UNIT, labelled, learned_from, packing_order
from .lines import Line, read_files, some_of
from .paired import PairedSource, pack_pairs
from .streams import Part, joined

CARD = Card(
    id="unlearning",
    kind="data",
    summary="Your own JSON Lines of what to forget and what to keep, with refusals to give instead.",
    needs=("UTF-8 files with a JSON object on each line; messages need a model with a chat template",),
    checked="tokens and labels are those of jsonl; shares of both streams in every step; what is cut; broken lines",
    tags=("files", "local", "own data", "unlearning", "forget", "retain", "refusal", "privacy", "streams"),
)

_WHAT = "data 'unlearning'"

log = logging.getLogger("fallline")


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions):
    """Where the lines are and how they are read."""

    forget: str | tuple[str, ...] = option(
        help="what to forget: files, folders (their *.jsonl, recursively) or patterns (** is any depth), one or a list"
    )
    retain: str | tuple[str, ...] | None = option(None, "what to keep, named in the same way; null: nothing is shown")
    refusals: str | None = option(
        None, "a text file with a refusal on each line, for objectives that teach one in place of what is forgotten"
    )
    share: float = option(
        0.5,
        "share of a step's rows that is to be forgotten, at least a row of each",
        gt=0,
        lt=1,
        source="NPO's code for TOFU: one example to keep with each to forget",
        used_if=("'retain' is given", lambda c: c.retain is not None),
    )
    chat: bool = option(
        True,
        "prompts and answers that are texts go through the model's chat template as user and assistant, where it has "
        "one; false keeps them as plain text",
    )
    length: int = option(
        512,
        "most tokens of an example, with its refusal where it has one, and tokens of a packed row",
        ge=8,
        source="as jsonl",
    )
    validation: float = option(
        0.05,
        "fraction of what is to be kept that is held out; of what is to be forgotten nothing is",
        gt=0,
        lt=1,
        source="as jsonl",
        used_if=("'retain' is given", lambda c: c.retain is not None),
    )

    def check(self) -> None:
        for name in ("forget", "retain", "refusals"):
            paths = getattr(self, name)
            if paths is not None and (not paths or "" in _listed(paths)):
                raise InputError(f"{name!r} must name files, folders or patterns, got {paths!r}")


Lines = Sequence[Line[Plain | Chat]]


class Encoded(NamedTuple):
    """Lines of one stream as tokens.

    Attributes:
        tokens: [T] uint32. asked: [T] bool, whether a token is a label.
        start, size, second: [examples] int64, where in `tokens` each begins, how many it has, and how many of them are
            of the answer with its prompt, the rest being of the refusal with it.
        line: [examples] int64, which line it is of.
        truncated: lines that were cut at their end. left_out: lines of which no label remains.
        characters: of all lines as the model sees them.
    """

    tokens: NDArray[np.uint32]
    asked: NDArray[np.bool_]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    second: NDArray[np.int64]
    line: NDArray[np.int64]
    truncated: list[int]
    left_out: list[int]
    characters: int


def build(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> Dataset:
    """Both streams, packed whole.

    `summary` counts forget and retain (lines), truncated, left_out, characters, tokens, labels, vocabulary, train_rows,
    validation_rows. The fingerprint covers lines, tokens and labels.

    Raises:
        InputError: a path that is not there or names no files; a file without an example; a line that is no example, or
            stands in both files, which is named; `vocab` given to a model that brings its tokenizer; nothing to forget,
            to keep or to hold out.
    """
    check_vocab(config, tokenizer, _WHAT)
    refusals = _refusals(config.refusals)
    forget, retain = (_read(paths, config, tokenizer) for paths in (config.forget, config.retain))
    _refuse_overlap(forget, retain)
    beside = [_refused(line, refusals) for line in forget] if refusals else []

    unit = "line"
    if tokenizer is None:
        told = [*(line.example for line in (*forget, *retain)), *(refusal for _, refusal in beside)]
        unit, tokenizer = LEARNED_UNIT, learned_from(told, config.vocab)
    found = [encode(forget, beside, tokenizer, config.length), encode(retain, [], tokenizer, config.length)]
    for lines, encoded, name in zip((forget, retain), found, ("forget", "retain"), strict=True):
        _warn(lines, encoded, name, config.length)

    tokens, asked = (np.concatenate(both) for both in zip(*(e[:2] for e in found), strict=True))
    held_out = _held_out(retain, found[1], config.validation)
    pad = padding(tokenizer)

    def packed(stream: int, which: NDArray[np.bool_]) -> PairedSource:
        lines, encoded = (forget, retain)[stream], found[stream]
        chosen = np.flatnonzero(which)
        order, part = packing_order([line.example.id for line in lines], encoded.line, chosen)
        start = encoded.start[chosen] + stream * len(found[0].tokens)
        return pack_pairs(
            tokens, asked, start, encoded.size[chosen], encoded.second[chosen], order, config.length, pad,
            "" if part.any() else unit,
        )  # fmt: skip

    whole = packed(FORGET, np.ones(len(found[0].line), bool))
    kept, apart = packed(RETAIN, ~held_out), packed(RETAIN, held_out)
    _check_amounts(config, whole, kept, apart, len(forget), len(retain))
    share = 1.0 if config.retain is None else config.share
    train = joined([Part("forget", FORGET, share, whole), Part("retain", RETAIN, 1 - share, kept)])
    validation = joined([Part("forget", FORGET, share, whole), Part("retain", RETAIN, 1 - share, apart)], True)

    digest = hashlib.sha256()
    for line in (*forget, *retain):
        digest.update(f"{line.example.id}\n".encode())
    for array in (tokens, asked, found[0].second, held_out):
        digest.update(array.tobytes())
    summary = {
        "forget": len(forget),
        "retain": len(retain),
        "truncated": sum(len(e.truncated) for e in found),
        "left_out": sum(len(e.left_out) for e in found),
        "characters": sum(e.characters for e in found),
        "tokens": len(tokens),
        "labels": int(asked.sum()),
        "vocabulary": len(tokenizer),
        "train_rows": len(train.rows) - 1,
        "validation_rows": len(validation.rows) - 1,
    }
    return Dataset(train, validation, tokenizer, digest.hexdigest(), summary)


def encode(
    lines: Lines, beside: Sequence[tuple[str, Plain | Chat]], tokenizer: PreTrainedTokenizerBase, length: int
) -> Encoded:
    """Lines as tokens, at most `length` of each with its refusal, or examples of at most so many of a ``text``.

    Args:
        lines: of one stream.
        beside: a refusal to each of them, with where it stands; or none.
        tokenizer, length: of the model, and of a row.

    Raises:
        InputError: a line that cannot be rendered, which is named.
    """
    tokens, asked = [np.empty(0, np.uint32)], [np.empty(0, np.bool_)]
    examples: list[tuple[int, int, int, int]] = []  # start, size, second, line
    truncated, left_out, total, characters = [], [], 0, 0
    refusals = labelled(beside, tokenizer, _WHAT)
    for number, (ids, learned, letters) in enumerate(labelled([line[:2] for line in lines], tokenizer, _WHAT)):
        characters += letters
        example, room = lines[number].example, length
        learned[:1] = False  # nothing comes before it
        if beside:
            other = next(refusals)
            characters += other.characters
            other.asked[:1] = False
            room = max(0, length - len(other.ids))
        if isinstance(example, Plain) and example.prompt is None:
            spans = [(start, min(length, len(ids) - start)) for start in range(0, len(ids) - 1, length - 1)]
        else:
            cut = len(ids) > room
            ids, learned = ids[:room], learned[:room]
            spans = [(0, len(ids))] if learned.any() and (not beside or other.asked.any()) else []
            if cut and spans:
                truncated.append(number)
        if not spans:
            left_out.append(number)
            continue
        more = len(other.ids) if beside else 0
        examples += [(total + start, size + more, size, number) for start, size in spans]
        tokens += [ids, other.ids] if beside else [ids]
        asked += [learned, other.asked] if beside else [learned]
        total += len(ids) + more
    start, size, second, line = np.array(examples, np.int64).reshape(-1, 4).T
    return Encoded(
        np.concatenate(tokens), np.concatenate(asked), start, size, second, line, truncated, left_out, characters
    )


def _listed(paths: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths or ()


def _read(
    paths: str | tuple[str, ...] | None, config: Config, tokenizer: PreTrainedTokenizerBase | None
) -> list[Line[Plain | Chat]]:
    """The examples of one stream; none, where it is not given."""
    template = tokenizer is not None and bool(tokenizer.chat_template)

    def example(line: str) -> Plain | Chat:
        found = parse(line, config.chat and template)
        if isinstance(found, Chat) and not template:
            raise InputError(
                "messages need a chat template, and the model has none; take a model with one, or give 'prompt' and "
                "'completion' as texts"
            )
        return found

    files = find_files(_listed(paths), ("jsonl",), _WHAT)
    lines = [Line(where, found, False) for where, found in read_files(files, _WHAT, example)]
    if paths is not None and not lines:
        raise InputError(f"{_WHAT}: the files of {', '.join(map(repr, _listed(paths)))} are all empty or blank")
    return lines


def _refusals(path: str | None) -> list[tuple[str, str]]:
    """Refusals with where each stands."""
    found = []
    for file in find_files(_listed(path), ("txt",), _WHAT):
        for number, line in read_lines(file.path, _WHAT):
            where = f"{file.path}:{number}"
            if line.lstrip().startswith("{"):
                raise InputError(f"{_WHAT}: {where}: a JSON object; 'refusals' has a plain text on each line")
            if line.strip():
                found.append((where, line.strip()))
    if path is not None and not found:
        raise InputError(f"{_WHAT}: 'refusals' {path!r} has no refusal: give a text on each line")
    return found


def _refused(line: Line[Plain | Chat], refusals: Sequence[tuple[str, str]]) -> tuple[str, Plain | Chat]:
    """The prompt of a line with a refusal to it, and where that stands.

    Raises:
        InputError: the line has no prompt.
    """
    example = line.example
    where, text = refusals[key(0, 0, f"data/refusal/{example.id}") % len(refusals)]
    if isinstance(example, Plain):
        if example.prompt is None:
            raise InputError(
                f"{_WHAT}: {line.where}: a 'text' has no prompt that could be refused; give 'prompt' and 'completion', "
                "or leave out 'refusals'"
            )
        return where, Plain(example.id, example.prompt, text)
    last = len(example.messages) - 1
    answer = {"role": "assistant", "content": text}
    return where, Chat(example.id, [*example.messages[:last], answer], (last,), example.tools)


def _refuse_overlap(forget: Lines, retain: Lines) -> None:
    where = {line.example.id: line.where for line in forget}
    for line in retain:
        if line.example.id in where:
            raise InputError(
                f"{_WHAT}: {where[line.example.id]} and {line.where} say the same: it cannot be forgotten and kept; "
                "remove one"
            )


def _held_out(lines: Lines, encoded: Encoded, fraction: float) -> NDArray[np.bool_]:
    """[examples of what is kept], of few at least one."""
    side = np.array([key(0, 0, f"data/side/{line.example.id}") for line in lines])[encoded.line]
    return side <= max(fraction * 2.0**63, side.min()) if len(side) else np.zeros(0, np.bool_)


def _check_amounts(
    config: Config, forget: PairedSource, kept: PairedSource, apart: PairedSource, lines: int, others: int
) -> None:
    if not len(forget):
        raise InputError(
            f"{_WHAT}: there is nothing to forget: none of {lines} lines has a label within 'length' = {config.length} "
            "tokens; give a larger 'length'"
        )
    if config.retain is not None and not (len(kept) and len(apart)):
        raise InputError(
            f"{_WHAT}: there is nothing to {'hold out' if len(kept) else 'keep'}: of {others} lines in 'retain', those "
            f"without a label within 'length' = {config.length} tokens are left out, and equal ones are trained on or "
            "held out together; give more, or a larger 'length'"
        )


def _warn(lines: Lines, encoded: Encoded, name: str, length: int) -> None:
    told = [
        f"{len(which)} {what} ({some_of(lines, which)})"
        for which, what in (
            (encoded.truncated, "cut at the end"),
            (encoded.left_out, "left out, without any label"),
        )
        if which
    ]
    if told:
        log.warning("%s: of %d in %r, at 'length' = %d tokens: %s", _WHAT, len(lines), name, length, "; ".join(told))
