"""Files that can be made again, kept between runs.

An entry is one file: a header with the length and SHA-256 of the payload, then the payload. It appears by a rename, so
that processes making the same entry at the same time each see either none or a whole one; it is checked whenever it is
read, and made again when it is damaged.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..folders import cache_dir, cache_errors

Bytes = NDArray[np.uint8]

_MAGIC = b"fallline"
_HEADER = struct.Struct("<8sQ32s16x")  # 64 bytes, so that the payload is aligned for every dtype


def cached(name: str, make: Callable[[], Iterable[bytes]]) -> Bytes:
    """The entry `name`, made first when it is missing or damaged.

    Args:
        name: path below `cache_dir()`; it must determine the payload, format version included.
        make: gives the payload in pieces, the same payload whenever it is called.

    Returns:
        The payload, uint8, read-only and memory-mapped.

    Raises:
        InputError: the cache folder cannot be read or written.
    """
    path = cache_dir() / name
    with cache_errors():
        found = _read(path)
        if found is None:
            _write(path, make())
            found = _read(path)
    if found is None:
        raise InputError(f"the cache file {path} reads back damaged; set FALLLINE_CACHE to a folder on another disk")
    return found


def cache_name(kind: str, *parts: object) -> str:
    """A name for an entry that depends on all of `parts`."""
    return f"{kind}/{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"


def _read(path: Path) -> Bytes | None:
    try:
        raw = np.asarray(np.memmap(path, np.uint8, "r"))
    except (FileNotFoundError, ValueError):  # ValueError: no bytes to map
        return None
    if len(raw) < _HEADER.size:
        return None
    magic, size, digest = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    payload = raw[_HEADER.size :]
    if magic != _MAGIC or size != len(payload) or digest != hashlib.sha256(payload.data).digest():
        return None
    return payload


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp", delete=False)  # noqa: SIM115
    try:
        with file:
            file.write(bytes(_HEADER.size))
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.seek(0)
            file.write(_HEADER.pack(_MAGIC, size, digest.digest()))
        os.replace(file.name, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise
