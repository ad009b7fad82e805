"""The model as a run began, and what it says of examples, asked once each.

Preferences and forgetting compare the trained model π with a frozen one, π_ref, which is the model before step 0. With
an adapter that is the trained model with its adapters off, and shares all weights; without one a copy is held, as many
bytes as the weights. A resumed run builds the model that its recipe names before it loads the trained weights, so what
is made in between is the same reference, to the bit.

Log-probabilities of sequences are kept, in memory and in the cache folder, under a hash of what the model sees of the
example (tokens, labels, positions, sequences), hence of text, tokenizer and chat template together; in a file for this
model: weights, configuration and what else moves the last bits (torch, device, threads). Each example is asked alone,
so that its value does not depend on the batch in which it is met first: a second run, a resumed one, or one whose cache
was deleted, gets the same bits.

Cost: one forward of each example that is met, once; of each, 24 + 8 K bytes of file for K sequences and some 300 bytes
of memory.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calibrate import evaluating
from .folders import cache_dir
from .sequences import sequence_logps
from .tokens import IGNORED

log = logging.getLogger("fallline")

SEEN = ("input_ids", "labels", "position_ids", "side")
"""Token columns from which a log-probability follows."""

FORMAT = 1


class Reference:
    """See the module docstring. Made before a run's state is loaded; it is no part of that state.

    Args:
        model: the model that will be trained.
        weights: a hash of its weights, without adapters.
        base: gives a context in which `model` answers as it began, such as one that turns adapters off. None: a copy is
            made, now.
    """

    def __init__(
        self, model: nn.Module, weights: str, base: Callable[[nn.Module], AbstractContextManager[None]] | None = None
    ) -> None:
        self._model = model if base is not None else copy.deepcopy(model).requires_grad_(False).eval()
        self._base: Callable[[nn.Module], AbstractContextManager[None]] = base or (lambda model: nullcontext())
        self._weights = weights
        self._kept: dict[int, Kept] = {}  # by the number of sequences of an example

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """The model as it began, for forwards without gradient: dropout is off inside. Nothing of it stays changed."""
        with self._base(self._model), asking(self._model):
            yield self._model

    def logps(self, batch: Mapping[str, Tensor], sequences: int = 2) -> Tensor:
        """log π_ref of the labels of each sequence, see `sequence_logps`. Waits for the device.

        Args:
            batch: as for `sequence_logps`.
            sequences: K.

        Returns:
            [B, K] float64, on the device of `batch`.
        """
        device = batch["input_ids"].device
        if sequences not in self._kept:
            self._kept[sequences] = Kept(self._path(device, sequences), sequences)
        kept = self._kept[sequences]
        examples = list(alone(batch))
        names = [content(example) for example in examples]
        new = {n: e for n, e in zip(names, examples, strict=True) if n not in kept.values}
        if new:
            with self.model() as model:
                kept.add({name: _asked(model, example, sequences, device) for name, example in new.items()})
        found = [kept.values[name] for name in names]
        return torch.tensor(found, dtype=torch.float64, device=device).view(len(names), sequences)

    def _path(self, device: torch.device, sequences: int) -> Path:
        config: Any = self._model.config
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        told = (
            FORMAT, sequences, self._weights, config.to_json_string(), config._attn_implementation, torch.__version__,
            where, torch.get_num_threads(),
        )  # fmt: skip
        return cache_dir() / "reference" / hashlib.sha256(repr(told).encode()).hexdigest()[:32]


@contextmanager
def asking(model: nn.Module) -> Iterator[None]:
    """Inside, a model is asked without gradient and dropout; afterwards it is in the mode in which it was."""
    with evaluating(model), torch.no_grad():
        yield


def _asked(model: nn.Module, example: Mapping[str, Tensor], sequences: int, device: torch.device) -> list[float]:
    """log p of the labels of each sequence of the only example of a batch."""
    if not bool((example["labels"] != IGNORED).any()):
        return [0.0] * sequences
    here = {name: column.to(device) for name, column in example.items()}
    found: list[float] = sequence_logps(model, here, sequences)[0].tolist()
    return found


def alone(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each example of a batch as a batch of its own, on the CPU, up to its last label."""
    columns = {name: batch[name].cpu() for name in SEEN if name in batch}
    number = len(batch["example_id"])
    if "segment" in batch:
        segment = batch["segment"].flatten().cpu()
        order = torch.argsort(segment, stable=True)
        sizes = torch.bincount(segment[segment >= 0], minlength=number)
        places = order[int((segment < 0).sum()) :].split(sizes.tolist())
        rows = [{name: column.flatten()[place] for name, column in columns.items()} for place in places]
    else:
        rows = [{name: column[b] for name, column in columns.items()} for b in range(number)]
    for row in rows:
        asked = (row["labels"] != IGNORED).nonzero()
        stop = int(asked[-1]) + 1 if len(asked) else 1
        yield {name: column[:stop].unsqueeze(0) for name, column in row.items()} | {"example_id": torch.zeros(1).long()}


def content(example: Mapping[str, Tensor]) -> bytes:
    """16 bytes that tell what the model sees of an example."""
    digest = hashlib.blake2b(digest_size=16)
    for name in SEEN:
        if name in example:
            digest.update(name.encode())
            digest.update(example[name].long().numpy().tobytes())
    return digest.digest()


class Kept:
    """Log-probabilities by content, in memory and in a file that only grows.

    A record is the content [16 bytes], K float64 and their checksum [8 bytes]; damaged ones are asked again. Several
    processes may add to one file.

    Attributes:
        values: content → K numbers.
    """

    def __init__(self, path: Path, sequences: int) -> None:
        self._path = path
        self._record = np.dtype([("name", "V16"), ("values", "<f8", (sequences,)), ("check", "<u8")])
        self.values: dict[bytes, list[float]] = {}
        self._writes = True
        try:
            raw = path.read_bytes() if path.is_file() else b""
        except OSError as error:
            self._without(error)
            return
        found = np.frombuffer(raw[: len(raw) // self._record.itemsize * self._record.itemsize], self._record)
        for one in found:
            if one["check"] == _check(one):
                self.values[one["name"].tobytes()] = one["values"].tolist()

    def add(self, values: Mapping[bytes, list[float]]) -> None:
        """Keep more."""
        self.values |= values
        if not self._writes:
            return
        rows = np.zeros(len(values), self._record)
        rows["name"] = np.frombuffer(b"".join(values), "V16")
        rows["values"] = list(values.values())
        rows["check"] = [_check(row) for row in rows]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                torn = file.seek(0, 2) % self._record.itemsize  # of a process that was killed while it wrote
                if torn:
                    file.truncate(file.tell() - torn)
                file.write(rows.tobytes())
        except OSError as error:
            self._without(error)

    def _without(self, error: OSError) -> None:
        self._writes = False
        log.warning(
            "cannot use %s (%s): what the reference says is kept for this process only; set FALLLINE_CACHE to a folder "
            "with space to write",
            self._path,
            error.strerror or error,
        )


def _check(record: Any) -> int:
    return zlib.crc32(record["name"].tobytes() + record["values"].tobytes())
