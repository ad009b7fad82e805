"""Saving a run and deleting what need not be kept; the format is in the package's docstring."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import InputError, StorageError
from ..step import Run
from . import files, tree
from .reading import FORMAT, MANIFEST, MODEL, STATE, TREE, complete, folders, remaining, seal_manifest


def save(
    folder: Path,
    run: Run,
    *,
    tokenizer: Any = None,
    export: Callable[[Path], None] | None = None,
    validation_loss: float | None = None,
    keep: int,
    keep_best: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Save `run` as ``folder/checkpoints/step-NNNNNNNN``, then delete what need not be kept.

    At every instant the checkpoints that were complete before are complete, or the new one is. Call it between steps,
    on one rank, while holding `lock(folder)`.

    Args:
        folder: of the run; it exists.
        run: its state is `run.state_dict()`.
        tokenizer: a 🤗 tokenizer, saved with the model.
        export: writes into `model/` what others load, where that is not the model's whole state: an adapter. The state
            then lies with the rest of the run's.
        validation_loss: of these weights.
        keep: how many of the newest to keep, at least 1.
        keep_best: keep also the one with the smallest finite validation loss.
        extra: what else `load` should return; values as in `run.state_dict()`.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: the state holds something that is not a tensor, number or text.
        StorageError: the disk refused; the message names the last good checkpoint.
    """
    assert export is not None or not run.given, "without its given part, the state is no model that others could load"
    home = folder / "checkpoints"
    name = f"step-{run.step:08d}"
    hidden = home / f".saving-{name}"
    try:
        with files.plain_errors():
            _prepare(home)
            _fill(hidden, run, tokenizer, export, validation_loss, extra or {})
            _reveal(hidden, home / name)
            _prune(home, run.step, keep, keep_best)
    except (OSError, InputError) as error:
        shutil.rmtree(hidden, ignore_errors=True)  # make room for the rest of the run's files
        if isinstance(error, InputError):
            raise
        what = str(error) if error.errno is None else f"{error.strerror} ({error.filename or home})"
        raise StorageError(f"step {run.step}: saving a checkpoint failed: {what}; {remaining(folder)}") from error
    return home / name


def _prepare(home: Path) -> None:
    """Make `home` and clear what killed writers left in it: hidden folders that only `save` makes."""
    checkpoint.point("begin")
    home.mkdir(exist_ok=True)
    files.sync_folder(home.parent)
    for left in home.iterdir():
        found = re.fullmatch(r"\.(saving|deleting|old)-(step-\d{8,})", left.name)
        if found and found[1] == "old" and not (home / found[2]).exists():
            left.rename(home / found[2])  # killed between the two renames of `_reveal`
        elif found:
            shutil.rmtree(left)
    checkpoint.point("cleaned")


def _fill(
    hidden: Path,
    run: Run,
    tokenizer: Any,
    export: Callable[[Path], None] | None,
    validation_loss: float | None,
    extra: Mapping[str, Any],
) -> None:
    """Write a whole checkpoint into the new folder `hidden`."""
    (hidden / "model").mkdir(parents=True)
    model, state, text = _split(run, extra, apart=export is None)
    (export or partial(_describe, model=run.model))(hidden / "model")
    if tokenizer is not None:
        tokenizer.save_pretrained(hidden / "model")
    entries = {str(p.relative_to(hidden)): files.seal(p) for p in sorted(hidden.rglob("*")) if p.is_file()}
    checkpoint.point("described")

    plans = {
        name: files.layout(tensors) for name, tensors in ((MODEL, model), (STATE, state)) if name == STATE or model
    }
    needed = sum(plan.size for plan in plans.values()) + len(text)
    free = shutil.disk_usage(hidden).free
    if needed > free:
        raise StorageError(f"{hidden.parent} has {files.human(free)} free and {files.human(needed)} are needed")
    checkpoint.point("checked")

    if MODEL in plans:
        entries[MODEL] = files.write_tensors(hidden / MODEL, plans[MODEL])
    checkpoint.point("model written")
    entries[STATE] = files.write_tensors(hidden / STATE, plans[STATE])
    entries[TREE] = files.write(hidden / TREE, iter([text]))
    checkpoint.point("state written")
    manifest = {"format": FORMAT, "step": run.step, "validation_loss": validation_loss, "files": entries}
    files.write(hidden / MANIFEST, iter([seal_manifest(tree.encode(manifest, tree.no_tensor))]))
    checkpoint.point("manifest written")
    for path in [*(p for p in hidden.rglob("*") if p.is_dir()), hidden]:
        files.sync_folder(path)
    checkpoint.point("synced")


def _split(run: Run, extra: Mapping[str, Any], apart: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], bytes]:
    """The tensors of the model's file, those of the state's file, and the tree that holds everything together.

    `apart`: the model has a file of its own.
    """
    whole = run.state_dict()
    owner = _owners(whole["model"], getattr(run.model, "all_tied_weights_keys", None))
    model: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}

    def put(path: tree.Path, tensor: Tensor) -> dict[str, Any]:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise InputError(f"the state at {tree.show(path)!r} is a {tensor.layout} tensor; only dense ones are saved")
        if apart and path[:2] == ("run", "model") and len(path) == 3:
            if tensor.dtype not in files.DTYPES:
                raise InputError(f"{tree.show(path[2:])!r} has dtype {tensor.dtype}, which safetensors cannot hold")
            name = owner[path[-1]]
            model[name] = tensor
            return {"$model": name}
        name = tree.show(path)
        while name in state:  # {"a/b": x} beside {"a": {"b": y}}
            name += "'"
        if tensor.dtype in files.DTYPES:
            state[name] = tensor
            return {"$tensor": name}
        state[name] = files.raw(tensor)
        return {"$tensor": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}

    whole_tree = tree.encode({"run": whole, "extra": extra}, put)
    return model, state, json.dumps(whole_tree, allow_nan=False, separators=(",", ":")).encode()


def _owners(state: Mapping[str, Any], tied: Mapping[str, str] | None) -> dict[str, str]:
    """Name of each of the model's tensors → the name it is stored under, the same for tied ones.

    A 🤗 model ties again only the names in its list `tied`; others must be in the file, though they share memory.
    """
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    first: dict[Any, str] = {}
    owner = {}
    for name in sorted(tensors, key=lambda name: name in (tied or ())):  # stable: the tied names last
        t = tensors[name]
        place = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
        shares = t.numel() > 0 and (tied is None or name in tied)
        owner[name] = first.get(place, name) if shares else name
        first.setdefault(place, name)
    return owner


def _describe(folder: Path, model: Any) -> None:
    """Write what makes a folder of weights a 🤗 model: the configuration, and how to generate."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.dtype = str(model.dtype).removeprefix("torch.")
        vars(config).pop("transformers_weights", None)  # the name of the file it was loaded from
        config.to_json_file(folder / "config.json")
        if model.can_generate():
            model.generation_config.to_json_file(folder / "generation_config.json")


def _reveal(hidden: Path, final: Path) -> None:
    """Give a written checkpoint its name."""
    old = final.with_name(f".old-{final.name}")
    if final.exists():  # the same step once more; until the next rename, `find` looks under the hidden name
        final.rename(old)
        checkpoint.point("replaced")
    hidden.rename(final)
    checkpoint.point("renamed")
    files.sync_folder(final.parent)
    checkpoint.point("durable")
    if old.exists():
        shutil.rmtree(old)


def _prune(home: Path, step: int, keep: int, keep_best: bool) -> None:
    """Delete all but the newest `keep` and the best; and those of later steps, which this run took back."""
    assert keep >= 1
    here = [s for s in complete(home) if s.step <= step]
    kept = {s.path for s in here[-keep:]}
    measured = [(s.validation_loss, -s.step, s.path) for s in here if s.validation_loss is not None]
    finite = [m for m in measured if math.isfinite(m[0])]
    if keep_best and finite:
        kept.add(min(finite)[2])
    for path in folders(home):
        if path not in kept:
            gone = path.with_name(f".deleting-{path.name}")
            path.rename(gone)
            checkpoint.point("pruning")
            shutil.rmtree(gone)
            checkpoint.point("pruned")
    files.sync_folder(home)
