"""The examples of an audit: read, tokenized and packed as training does, each with its file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..checkpoint.reading import TREE
from ..checkpoint.tree import decode
from ..contracts import Batch
from ..data.conversation import Chat, Plain
from ..data.dataset import padding
from ..data.jsonl import Config, encode, read
from ..data.lines import Line
from ..data.packed import PackedSource, pack_whole
from ..errors import InputError
from ..noise import rng
from ..probes.attack import FOLDS
from ..recipe import Recipe
from .trained import data_of_run

FLAGS = {"members": "--members", "non_members": "--non-members"}


@dataclass(frozen=True)
class Training:
    """A run's examples as the model sees them: by `identity`.

    Attributes:
        trained_on: those to train on. held_out: all others in its data.
        never_drawn: those of `trained_on` that no step had drawn when the model was saved; empty where it is not known.
    """

    trained_on: frozenset[bytes]
    held_out: frozenset[bytes]
    never_drawn: frozenset[bytes]


@dataclass(frozen=True, eq=False)
class Examples:
    """Members and non-members, N together, no two of them alike.

    Attributes:
        where: ``FILE:LINE`` of each. member: [N], whether it is one. text: of each, as far as the model sees it.
        lengths: [N, 2], tokens and labels of each.
        source: them as pieces of packed rows, in another order. piece: [N], which example a piece of `source` is.
        files: side → its path, the sha256 of each file, how many lines there are, are used, are judged by their first
            `length` tokens (`cut`), are used though the run never drew them (`never_drawn`), and were left out:
            without a label (`left_out`), as no members after all since the run held them out (`held_out`), and as they
            repeat another (`repeated`).
    """

    where: list[str]
    member: NDArray[np.bool_]
    text: list[str]
    lengths: NDArray[np.int64]
    source: PackedSource
    piece: NDArray[np.int64]
    files: dict[str, dict[str, Any]]

    def batches(self, rows: int) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """All examples once, `rows` packed rows at a time: (which they are [B], batch)."""
        for batch in self.source.batches(rows):
            yield self.piece[batch["example_id"].numpy()], batch


def read_training(recipe: Recipe, run: Path, model: Path) -> tuple[Training | None, list[str]]:
    """What a run was trained on, read again; None where that cannot be; with a sentence on what is not known or drawn.

    Args:
        recipe: of the run. run: its folder. model: the model's folder.
    """
    if recipe.data.id != "jsonl":
        return None, [f"Membership was not checked: the run's data is {recipe.data.id!r}, its examples are not lines."]
    try:
        data = data_of_run(run)
    except InputError as error:
        return None, [f"Membership was not checked: {error}."]
    train, validation = identities(data.train), identities(data.validation)
    whole, never, said = frozenset(train), frozenset[bytes](), list[str]()
    try:
        ids = drawn(recipe, data.train, model)
    except InputError as error:
        said.append(f"Whether every member was drawn in training is not known: {error}.")
    else:
        never = whole - {train[i] for i in ids}
        if len(ids) < len(train):
            said.append(f"The run drew {len(ids)} of {len(train)} training examples.")
    return Training(whole, frozenset(validation) - whole, never), said


def drawn(recipe: Recipe, source: PackedSource, model: Path) -> list[int]:
    """The ids of all examples that a run had drawn when its model was saved.

    They follow from seed, step and the sampler's state, so that the draws can be repeated.

    Args:
        recipe: of the run. source: what it trained on. model: the model's folder, in a checkpoint.

    Raises:
        InputError: the sampler cannot be built again, or goes by more than that; the checkpoint cannot be read.
    """
    word = recipe.sampler
    sampler = word.module.build(word.options, source, rows=recipe.settings.batch, seed=recipe.settings.seed)
    if hasattr(sampler, "prepare") or hasattr(sampler, "observe"):
        raise InputError(f"the sampler {word.id!r} chose by what it saw in training")
    path = model.resolve().parent / TREE
    try:
        state = json.loads(path.read_bytes())["run"]
        steps = range(state["step"])
        if hasattr(sampler, "load_state_dict"):
            sampler.load_state_dict(decode(state["sampler"], _no_tensor))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r})") from None
    found = np.zeros(len(source), np.bool_)
    for step in steps:
        found[sampler.draw(step, rng(recipe.settings.seed, step, "draw")).ids.numpy()] = True
        if found.all():
            break
    ids: list[int] = np.flatnonzero(found).tolist()
    return ids


def _no_tensor(mark: Mapping[str, Any]) -> Any:
    raise ValueError(f"the sampler's state has a tensor, {mark}")


def identities(source: PackedSource) -> list[bytes]:
    """What each example of a source is to the model, by id."""
    assert source.asked is not None
    spans = zip(source.start.tolist(), source.size.tolist(), strict=True)
    return [identity(source.tokens, source.asked, slice(at, at + size)) for at, size in spans]


def identity(tokens: NDArray[Any], asked: NDArray[np.bool_], span: slice) -> bytes:
    """What an example is to the model: its tokens, and which of them are labels."""
    return bytes(tokens[span].tobytes() + asked[span][1:].tobytes())


def read_examples(
    recipe: Recipe, members: str, non_members: str, tokenizer: PreTrainedTokenizerBase, training: Training | None
) -> Examples:
    """Read both sides.

    A line is one example: of a ``text`` of more than `length` tokens, the first `length`. What the run held out for
    validation is no member, and is left out of them.

    Args:
        recipe: of the run, for `length` and `chat` of its data.
        members, non_members: files, folders or patterns, as data 'jsonl' takes them.
        tokenizer: of the run.
        training: what it was trained on; None: not known, and both files are taken at their word.

    Raises:
        InputError: a path or line that cannot be used, a member that was not trained on, a non-member that was, fewer
            than five usable examples on a side, or one that stands on both.
    """
    if Path(members).resolve() == Path(non_members).resolve():
        raise InputError(f"--members and --non-members are both {members}; non-members were not trained on")
    length, chat = recipe.data.options.length, getattr(recipe.data.options, "chat", True)
    template = bool(tokenizer.chat_template)
    lines: list[Line[Plain | Chat]] = []
    side_of: list[str] = []
    files: dict[str, dict[str, Any]] = {}
    for side, path in (("members", members), ("non_members", non_members)):
        options = {"path": path, "length": length, "chat": chat}
        found = list(read(Config.from_mapping(options, FLAGS[side]), template))
        lines += found
        side_of += [side] * len(found)
        hashes = {name: _sha256(name) for name in dict.fromkeys(line.where.rpartition(":")[0] for line in found)}
        files[side] = {"path": path, "sha256": hashes, "lines": len(found), "used": 0} | dict.fromkeys(
            ("cut", "left_out", "held_out", "repeated", "never_drawn"), 0
        )
    encoded = encode(lines, tokenizer, length)
    first = np.diff(encoded.line, prepend=-1) != 0  # a long text has more examples
    for number in encoded.left_out:
        files[side_of[number]]["left_out"] += 1

    cut = {*encoded.truncated, *encoded.line[~first].tolist()}
    kept: list[int] = []
    seen: dict[bytes, int] = {}
    for i in np.flatnonzero(first).tolist():
        number, span = int(encoded.line[i]), slice(encoded.start[i], encoded.start[i] + encoded.size[i])
        name = identity(encoded.tokens, encoded.asked, span)
        tally = files[side_of[number]]
        if training is not None:
            if side_of[number] == "members" and name in training.held_out:
                tally["held_out"] += 1
                continue
            check_side(lines[number].where, side_of[number], name in training.trained_on)
        other = seen.setdefault(name, number)
        if other == number:
            kept.append(i)
            tally["used"] += 1
            tally["cut"] += number in cut
            tally["never_drawn"] += training is not None and name in training.never_drawn
        elif side_of[other] == side_of[number]:
            tally["repeated"] += 1
        else:
            raise InputError(
                f"{lines[other].where} of --members and {lines[number].where} of --non-members are the same example to "
                f"the model, which reads {length} tokens; remove it from one of them"
            )
    for side, tally in files.items():
        if tally["used"] < FOLDS:
            raise InputError(
                f"{FLAGS[side]} has {tally['used']} usable examples in {tally['lines']} lines ({tally['left_out']} "
                f"without a label within {length} tokens, {tally['held_out']} held out by the run, {tally['repeated']} "
                f"repeated); an audit needs {FOLDS} or more"
            )
    start, size = encoded.start[kept], encoded.size[kept]
    order = np.arange(len(kept))
    source = pack_whole(encoded.tokens, encoded.asked, start, size, order, length, padding(tokenizer))
    numbers = encoded.line[kept].tolist()
    spans = [slice(a, a + n) for a, n in zip(start.tolist(), size.tolist(), strict=True)]
    tokens = [encoded.tokens[span].tolist() for span in spans]
    labels = [int(encoded.asked[span][1:].sum()) for span in spans]
    return Examples(
        where=[lines[number].where for number in numbers],
        member=np.array([side_of[number] == "members" for number in numbers]),
        text=[str(tokenizer.decode(span, skip_special_tokens=True)) for span in tokens],
        lengths=np.column_stack([size, labels]),
        source=source,
        piece=np.searchsorted(start, source.start),
        files=files,
    )


def check_side(where: str, side: str, trained_on: bool) -> None:
    """
    Raises:
        InputError: a line of the members was not trained on, or one of the others was.
    """
    if side == "members" and not trained_on:
        raise InputError(f"{where} of --members is not in what the run was trained on; remove it")
    if side == "non_members" and trained_on:
        raise InputError(f"{where} of --non-members is in what the run was trained on; remove it")


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
