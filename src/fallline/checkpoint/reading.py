"""Finding, verifying and loading the checkpoints of a run folder; the format is in the package's docstring."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import InputError
from ..step import Run
from . import tree

FORMAT = 1
MODEL = "model/model.safetensors"
STATE = "state.safetensors"
TREE = "state.json"
MANIFEST = "manifest.json"

log = logging.getLogger("fallline")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk.

    Attributes:
        path: its folder.
        step: finished steps of the run.
        validation_loss: None where it was not measured.
        verified: whether every file's checksum was compared; otherwise only names and sizes were.
    """

    path: Path
    step: int
    validation_loss: float | None
    verified: bool = False


def find(folder: Path) -> list[Saved]:
    """The complete checkpoints of a run folder by step: the manifest is sound and all files have its sizes."""
    return complete(folder / "checkpoints")


def verify(path: Path, below: str = "") -> Saved:
    """Read every file of a checkpoint, or those below a folder in it such as ``model/``, and compare its checksum.

    Raises:
        InputError: the checkpoint is damaged or of another format; the message names the file.
    """
    return _check(path, contents=True, below=below)


def latest_good(folder: Path) -> Saved | None:
    """The newest checkpoint of a run folder that verifies, None if there is none; logs those passed over."""
    return _newest(folders(folder / "checkpoints"))


def remaining(folder: Path) -> str:
    """The end of an error message: which checkpoint of a run folder can be loaded."""
    good = latest_good(folder)
    return f"the last good checkpoint is {good.path}" if good else "there is no checkpoint to go back to"


def load(saved: Saved, run: Run) -> dict[str, Any]:
    """Continue `run` from a checkpoint, bit for bit.

    Nothing of the run changes before the whole checkpoint is verified and read.

    Args:
        saved: from `latest_good`, or from `find` or `verify`.
        run: built from the recipe that the checkpoint was saved under.

    Returns:
        What `save` was given as `extra`.

    Raises:
        InputError: the checkpoint is damaged, or of a run with other parts or shapes.
    """
    path = saved.path
    try:
        if not saved.verified:
            verify(path)
    except InputError as error:
        older = _newest([p for p in folders(path.parent) if _step(p) < saved.step])
        way_out = f"the next older good one is {older.path}" if older else "there is no older good one"
        raise InputError(f"{error}; {way_out}") from None
    with contextlib.ExitStack() as open_files:
        state = open_files.enter_context(safe_open(path / STATE, "pt"))
        if (path / MODEL).is_file():  # otherwise the model's state is an adapter's, and lies with the rest
            model = open_files.enter_context(safe_open(path / MODEL, "pt"))

        def get(mark: dict[str, Any]) -> Tensor:
            if "$model" in mark:
                return model.get_tensor(mark["$model"])  # a view of the file; the model copies it
            t: Tensor = state.get_tensor(mark["$tensor"]).clone()  # an optimizer may keep it: own and align its memory
            return t.view(getattr(torch, mark["dtype"])).reshape(mark["shape"]) if "dtype" in mark else t

        whole = tree.decode(json.loads((path / TREE).read_bytes()), get)
        run.load_state_dict(whole["run"])
    return whole["extra"]


def _newest(paths: Sequence[Path]) -> Saved | None:
    for path in reversed(paths):
        try:
            return verify(path)
        except InputError as error:
            log.warning("passing over a checkpoint: %s", error)
    return None


def complete(home: Path) -> list[Saved]:
    found = []
    for path in folders(home):
        with contextlib.suppress(InputError):
            found.append(_check(path, contents=False))
    return found


def folders(home: Path) -> list[Path]:
    """The checkpoints' folders by step, damaged ones too."""
    by_step = {}
    for path in (*home.glob(".old-step-*"), *home.glob("step-*")):  # see `_reveal`; a final name wins
        if re.fullmatch(r"(\.old-)?step-\d{8,}", path.name):
            by_step[_step(path)] = path
    return [by_step[step] for step in sorted(by_step)]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _check(path: Path, contents: bool, below: str = "") -> Saved:
    """Compare a checkpoint, or what of it is below a folder, with its manifest: names and sizes, contents if asked."""
    try:
        manifest = _open_manifest((path / MANIFEST).read_bytes())
        for name, entry in manifest["files"].items():
            if not name.startswith(below):
                continue
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{name} has {size} bytes, not {entry['bytes']}")
            if contents:
                with (path / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                        raise ValueError(f"the contents of {name} have changed")
    except OSError as error:
        name = os.path.relpath(error.filename, path) if error.filename else "a file"
        raise InputError(f"{path} is damaged: {name}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    return Saved(path, manifest["step"], manifest["validation_loss"], verified=contents and not below)


def seal_manifest(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as text, with a checksum of itself."""

    def text(table: Mapping[str, Any]) -> bytes:
        return json.dumps(table, indent=2, sort_keys=True, allow_nan=False).encode()

    return text({**manifest, "sha256": hashlib.sha256(text(manifest)).hexdigest()}) + b"\n"


def _open_manifest(data: bytes) -> dict[str, Any]:
    """A manifest from its text.

    Raises:
        ValueError: it is of another format, or not as it was written.
    """
    try:
        manifest = json.loads(data)
    except ValueError:
        manifest = None
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{MANIFEST} says format {manifest['format']}, and this version reads format {FORMAT}")
    if not isinstance(manifest, dict) or not manifest.pop("sha256", None) or seal_manifest(manifest) != data:
        raise ValueError(f"the contents of {MANIFEST} have changed")
    return tree.decode(manifest, _no_mark)


def _no_mark(mark: dict[str, Any]) -> Tensor:
    raise ValueError(f"a manifest has no {next(iter(mark))}")
