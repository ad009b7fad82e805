"""Lines as token sequences, with the labels among them marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .conversation import Chat, Plain, marked, special_tokens, start_tokens, tokenized
from .lines import located

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
