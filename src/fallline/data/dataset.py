"""From documents to what a run needs: packed rows to train on and to validate on, a tokenizer, a fingerprint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..options import Options, option
from .documents import Document, contents
from .packed import PackedSource, pack
from .tokenizer import SMALLEST, Encoded, encode, learned_tokenizer


@dataclass(frozen=True)
class DataOptions(Options):
    """What every source of documents takes."""

    length: int = option(256, "tokens per packed row", ge=8, source="GaLore, appendix C.1")
    vocab: int = option(
        4096,
        "most entries of the tokenizer learned from the text, for a model that brings none",
        ge=SMALLEST,
        source="chosen here: 3.5 characters a token on python-docs",
    )
    validation: float = option(
        0.05, "fraction of the documents that is held out", gt=0, lt=1, source="chosen here: 106 rows of python-docs"
    )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Text ready for a run.

    Attributes:
        train, validation: packed rows; no document has a piece in both.
        tokenizer: the model's own, or the one learned from the documents; `save_pretrained` and
            `AutoTokenizer.from_pretrained` save and load it.
        fingerprint: SHA-256 of the documents' ids and texts in order.
        summary: documents, characters, tokens, vocabulary, train_rows, validation_rows.
    """

    train: PackedSource
    validation: PackedSource
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    summary: dict[str, int]


def make_dataset(
    documents: Iterable[Document], config: DataOptions, tokenizer: PreTrainedTokenizerBase | None, what: str
) -> Dataset:
    """Tokenize, split and pack documents.

    A document is held out when a hash of its id falls below `config.validation` (of few, at least the lowest), and
    documents are packed in the order of another hash of their ids, so neither depends on the run's seed, and both stay
    when documents are added. Blank documents are left out.

    Args:
        documents: gone through several times.
        config: length of a row, size of the vocabulary, fraction held out.
        tokenizer: the model's own; None to learn one from the documents.
        what: how to name the source in an error, such as ``data 'text'``.

    Raises:
        InputError: too little text for one row to train on and one to validate on, `vocab` given to a tokenizer that
            is not learned, or a cache folder that cannot be used.
    """
    check_vocab(config, tokenizer, what)
    fingerprint, number, characters = contents(documents)
    if number == 0:
        raise InputError(f"{what}: there is no text, only blank documents or none")
    if tokenizer is None:
        tokenizer = learned_tokenizer(documents, fingerprint, config.vocab)
    encoded = encode(documents, fingerprint, tokenizer)
    held_out = encoded.side < config.validation * 2.0**63
    if number > 1 and not held_out.any():  # few documents: still one to validate on
        held_out[encoded.side.argmin()] = True
    pad = padding(tokenizer)
    train, validation = (_packed(encoded, side, config.length, pad) for side in (~held_out, held_out))
    for name, source, side in (("train on", train, ~held_out), ("validate on", validation, held_out)):
        if len(source) == 0:
            raise InputError(
                f"{what}: too little text to {name}: {int(encoded.size[side].sum())} tokens in {int(side.sum())} of "
                f"{number} documents (whole documents are held out), and one row of 'length' needs {config.length}; "
                "give more or smaller documents, a smaller 'length' or another 'validation'"
            )
    summary = {
        "documents": number,
        "characters": characters,
        "tokens": len(encoded.tokens),
        "vocabulary": len(tokenizer),
        "train_rows": len(train.rows) - 1,
        "validation_rows": len(validation.rows) - 1,
    }
    return Dataset(train, validation, tokenizer, fingerprint, summary)


def check_vocab(config: DataOptions, tokenizer: PreTrainedTokenizerBase | None, what: str) -> None:
    """Refuse a size of the vocabulary for a tokenizer that is not learned.

    Raises:
        InputError: `vocab` was given, and the model brings its tokenizer.
    """
    if tokenizer is not None and config.vocab != DataOptions.vocab:
        raise InputError(f"{what}: 'vocab' has no effect, the model brings its own tokenizer; remove it")


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a row: the tokenizer's own, else its end token, else 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _packed(encoded: Encoded, side: NDArray[np.bool_], length: int, pad: int) -> PackedSource:
    chosen = np.flatnonzero(side)
    chosen = chosen[np.argsort(encoded.order[chosen], kind="stable")]
    start = np.cumsum(encoded.size) - encoded.size
    return pack(encoded.tokens, start[chosen], encoded.size[chosen], length, pad)
