"""Where Fallline keeps what can be made again, and how a whole folder gets there."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

log = logging.getLogger("fallline")

MANIFEST = "manifest.json"


def cache_dir() -> Path:
    """Where entries are kept: `FALLLINE_CACHE`, else `fallline` below `XDG_CACHE_HOME`, else ``~/.cache/fallline``."""
    own, shared = os.environ.get("FALLLINE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "fallline"


@contextmanager
def cache_errors() -> Iterator[None]:
    """What the disk refuses inside is told in one line.

    Raises:
        InputError: the cache folder cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot use the cache folder {cache_dir()}: {reason}; set FALLLINE_CACHE to a folder with space to write"
        ) from None


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name`, made first when it is missing, or lacks a file, or one has another size than when it was made.

    It appears by one rename, with all its files synced. One process makes it, others that want it wait; what a killed
    one left is removed. Only sizes are compared at each call, so that it costs nothing to have a large one.

    Args:
        name: path below `cache_dir()`; it must determine the content, format version included.
        make: fills the new folder that it is given.

    Raises:
        InputError: the cache folder cannot be read or written.
    """
    path = cache_dir() / name
    if _complete(path):
        return path
    with cache_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_here(path):
            if not _complete(path):  # another process may have made it while this one waited
                _make(path, make)
    return path


def readable(folder: Path) -> None:
    """Let whoever may read other new files read weights too: the safetensors library keeps them to their owner."""
    probe = folder / ".mode"
    probe.touch()
    for path in folder.glob("*.safetensors"):
        path.chmod(probe.stat().st_mode)
    probe.unlink()


def _complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / MANIFEST).read_bytes())
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # missing; not JSON; not an object
        return False


@contextmanager
def _only_here(path: Path) -> Iterator[None]:
    """Hold the lock on `path`; the kernel lets go when the process ends, however it ends."""
    with path.with_name(f".{path.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another process that makes %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(path: Path, make: Callable[[Path], None]) -> None:
    for left in path.parent.glob(f".making-{path.name}-*"):  # whoever left it is dead: this process holds the lock
        shutil.rmtree(left, ignore_errors=True)
    hidden = path.with_name(f".making-{path.name}-{os.getpid()}")
    hidden.mkdir()
    try:
        make(hidden)
        files = sorted(p for p in hidden.rglob("*") if p.is_file())
        sizes = {p.relative_to(hidden).as_posix(): p.stat().st_size for p in files}
        (hidden / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        for p in (*hidden.rglob("*"), hidden):
            _sync(p)
        shutil.rmtree(path, ignore_errors=True)  # incomplete, or it would not be made again
        hidden.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
