"""Lines as token sequences, with the labels among them marked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..noise import key
from .conversation import Chat, Plain, marked, special_tokens, start_tokens, tokenized
from .documents import Document, contents
from .lines import located
from .tokenizer import learned_tokenizer

_AT_ONCE = 256  # examples tokenized at once


class Labelled(NamedTuple):
    """An example as the model sees it, uncut.

    Attributes:
        ids: [T] uint32. asked: [T] bool, whether a token is learned.
        characters: of the text.
    """

    ids: NDArray[np.uint32]
    asked: NDArray[np.bool_]
    characters: int


def labelled(
    examples: Sequence[tuple[str, Plain | Chat]], tokenizer: PreTrainedTokenizerBase, what: str
) -> Iterator[Labelled]:
    """Each example as tokens.

    Plain text is given the tokenizer's tokens around it: a text without a prompt its start and end token, a prompt what
    the tokenizer itself puts before a text, an answer the end token.

    Args:
        examples: each with the file and line where it stands.
        tokenizer: of the model.
        what: how to name the source in an error, such as ``data 'jsonl'``.

    Raises:
        InputError: an example that cannot be rendered, which is named.
    """
    specials = special_tokens(tokenizer)
    bos, eos = ([] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    before = start_tokens(tokenizer)
    for first in range(0, len(examples), _AT_ONCE):
        batch, texts = examples[first : first + _AT_ONCE], []
        for where, example in batch:
            with located(what, where):
                texts.append(marked(example, tokenizer, specials))
        for (_, example), (text, _), parts in zip(batch, texts, tokenized(texts, tokenizer), strict=True):
            if isinstance(example, Plain):
                parts = [(bos if example.prompt is None else before) + parts[0], parts[1] + eos]
            asked = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in parts])
            yield Labelled(np.fromiter(chain.from_iterable(parts), np.uint32), asked, len(text))


LEARNED_UNIT = "line, given the tokenizer that was learned from all of them"
"""What one example is alone of, where `learned_from` has seen all."""


def learned_from(examples: Iterable[Plain | Chat], vocab: int) -> PreTrainedTokenizerBase:
    """The tokenizer learned from plain texts, for a model that brings none; chats need the model's own."""
    plain = [e for e in examples if isinstance(e, Plain)]
    documents = [Document(e.id, (e.prompt or "") + e.answer) for e in plain]
    return learned_tokenizer(documents, contents(documents).fingerprint, vocab)


def packing_order(
    ids: Sequence[str], line: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """In which order examples are packed, by a hash of their lines; and which part of its line each is.

    Args:
        ids: of the lines. line: [examples], which line each is of, in order. chosen: [n], which examples.

    Returns:
        [n] each.
    """
    part = (np.arange(len(line)) - np.searchsorted(line, line))[chosen]  # of a long text
    names = (f"data/order/{ids[line[i]]}#{p}" for i, p in zip(chosen, part, strict=True))
    return np.fromiter((key(0, 0, name) for name in names), np.int64), part
