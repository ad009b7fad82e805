"""Scores of a run's training examples, as a file that knows which examples they are of.

A safetensors file with `scores` [N] float32, by example id, NaN where there is nothing to score. Its metadata are
`examples` (see `examples_hash`), `data` (the fingerprint of the documents), `by` (which score), `runs` (as JSON),
`mean` and `sd`.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..contracts import Source
from ..errors import InputError
from ..noise import rng
from .packed import whole_rows
from .uniform import number_of_rows

_AT_ONCE = 256  # rows


def examples_hash(source: Source) -> str:
    """SHA-256 of what every example says and where it lies: tokens and labels, row by row.

    So it changes with the data, the tokenizer, the length of a row and what is held out: with all that decides what
    the ids mean.
    """
    digest = hashlib.sha256(str(len(source)).encode())
    for rows in torch.arange(number_of_rows(source)).split(_AT_ONCE):
        batch = source(whole_rows(source.rows, rows), rng(0, 0, "examples"))
        for name in sorted(batch):
            digest.update(json.dumps([name, str(batch[name].dtype), *batch[name].shape]).encode())
            digest.update(batch[name].numpy().tobytes())
    return digest.hexdigest()


def read_scores(path: str | Path, source: Source) -> Tensor:
    """The scores of the examples of `source`, [N] float32.

    Raises:
        InputError: no such file, no scores in it, or they are of other examples.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(
            f"there is no file {str(path)!r} of scores; make one: fallline score RUN --by el2n --out "
            f"{shlex.quote(str(path))}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            scores, told = file.get_tensor("scores"), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise _no_scores(path, str(error)) from None
    if not scores.is_floating_point() or scores.dim() != 1:
        dtype = str(scores.dtype).removeprefix("torch.")
        raise _no_scores(path, f"its 'scores' are {dtype} {list(scores.shape)}, must be float [examples]")
    if told.get("examples") != examples_hash(source):
        raise InputError(
            f"{path} has scores of {len(scores)} other examples than the {len(source)} of this data; keep the data, "
            "its 'length' and the tokenizer, or score a run of this data: fallline score RUN --by el2n --out FILE"
        )
    if len(scores) != len(source):
        raise _no_scores(path, f"it has {len(scores)} for {len(source)} examples")
    return scores.float()


def _no_scores(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not a file of scores ({why}); `fallline score` makes one")
