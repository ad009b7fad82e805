"""The run folder: where it may be, what is written first, and what a resume must find unchanged."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from itertools import count
from pathlib import Path

from .. import checkpoint
from ..checkpoint import files
from ..errors import InputError
from ..metrics import read
from ..recipe import Recipe
from .setting import Setting

log = logging.getLogger("fallline")


def run_folder(recipe: Recipe, resume: bool) -> Path:
    """Where the run goes, checked but not made.

    Raises:
        InputError: another run is there, there is nothing to resume, or it cannot be written.
    """
    if recipe.settings.out is None:
        if resume:
            raise InputError("--resume needs the run's folder: out=runs/…, or the folder in place of the recipe")
        out = next_free(f"{recipe.name}-{recipe.optimizer.id}")
    else:
        out = Path(recipe.settings.out)
    if resume:
        if not (out / "run.json").is_file():
            raise InputError(f"nothing to resume in {out}: it holds no run; leave out --resume to start one")
        return out
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file, a run needs a folder")
    if (out / "run.json").exists():
        raise InputError(f"{out} already holds a run; add --resume to continue it, or choose another out=")
    if out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir()):  # hidden: left by a killed start
        raise InputError(f"{out} is not empty and holds no run; choose another out=")
    there = next(p for p in (out, *out.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {out}: no permission in {there}")
    return out


def next_free(stem: str) -> Path:
    """The first of runs/STEM-1, runs/STEM-2, … that is not there."""
    return next(path for n in count(1) if not (path := Path("runs") / f"{stem}-{n}").exists())


def make_folder(out: Path) -> None:
    """Make the run's folder, so that it can be locked.

    Raises:
        InputError: the disk does not let us.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the run folder {out}: {error.strerror or error}") from None


def open_folder(setting: Setting, out: Path, resume: bool) -> checkpoint.Saved | None:
    """Write what the run is, or check that the run to resume is of this recipe and data. The folder is locked.

    Returns:
        The checkpoint to continue from; None starts at step 0.

    Raises:
        InputError: another recipe, data or model; or the folder cannot be written.
    """
    if not resume:
        record = {"recipe": setting.recipe.to_mapping()} | setting.record
        try:
            write_text(out / "run.json", json.dumps(record, indent=2) + "\n")  # first: with it, the folder is a run
            write_text(out / "recipe.yaml", setting.recipe.to_yaml())
        except OSError as error:
            raise InputError(f"cannot write the run folder {out}: {error.strerror or error}") from None
        return None
    try:
        stored = json.loads((out / "run.json").read_text(encoding="utf-8"))
        changed = setting.recipe.differences(stored["recipe"])
        for what in ("data", "model"):
            if stored[what]["sha256"] != setting.record[what]["sha256"]:
                changed.append(f"{what}: the content is not the one the run began with")
        if stored.get("also") != setting.record.get("also"):
            changed.append("eval.also: the content is not the one the run began with")
        unlike = [k for k in ("threads", "device", "ranks", "versions", "platform") if stored[k] != setting.record[k]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot resume: {out / 'run.json'} is damaged ({error!r})") from None
    saved = checkpoint.latest_good(out)
    if changed:
        good = f"; its last checkpoint is {saved.path}" if saved else ""
        raise InputError(f"cannot resume {out} with another recipe: {'; '.join(changed)}{good}")
    if unlike:
        told = "; ".join(f"{k} {stored[k]} then, {setting.record[k]} now" for k in unlike)
        log.warning("resuming, but not bit-identically: %s", told)
    return saved


def write_text(path: Path, text: str) -> None:
    """All of it or nothing, on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    files.write(temporary, iter([text.encode()]))
    temporary.replace(path)
    files.sync_folder(path.parent)


def validation_curve(out: Path) -> dict[int, float]:
    """Step → validation loss, of a run that may still be going on; empty before it has begun."""
    path = out / "metrics.jsonl"
    return {m["step"]: m["val_loss"] for m in read(path) if "val_loss" in m} if path.is_file() else {}


def link_model(out: Path) -> None:
    """Point `model` at what the newest checkpoint exported."""
    saved = checkpoint.find(out)[-1]
    _link(out / "model", Path("checkpoints") / saved.path.name / "model")


def link_latest(out: Path) -> None:
    """Point `runs/latest` at a run in `runs/`; runs elsewhere leave it alone."""
    if out.absolute().parent == Path("runs").absolute():
        with suppress(OSError):  # a folder of that name, or a file system without links: a convenience only
            _link(Path("runs/latest"), Path(out.name))


def _link(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    try:
        temporary.replace(link)
    finally:
        temporary.unlink(missing_ok=True)
