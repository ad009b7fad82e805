"""Export: take what was trained out of a run, as a folder that 🤗 Transformers or PEFT loads.

The folder is loaded again and asked before it gets its name, so an export that is there computes what was trained.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from .. import adapters, checkpoint
from ..adapters.gated import gated
from ..checkpoint import files
from ..errors import FalllineError, InputError, StorageError
from ..folders import readable
from ..generate import positions
from ..models.loading import quietly
from ..noise import rng
from ..quantised import kind_of
from .trained import Trained, in_full, open_trained

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Largest difference of a logit, as a part of the largest logit, that may come of sums in another order and of rounding
merged weights: some hundred roundings in float32, some ten in the narrow dtypes."""

TOKENS = 32


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        kind: ``model``, ``adapter`` or ``merged model``.
        loader: the library that loaded it again.
        difference: largest difference between its logits and the trained model's.
        allowed: the most that this may be; 0 for a model that is copied.
        largest: the largest logit.
        quantised: how the base was quantised beside which the adapter was trained; what is written is for the base in
            full precision. Empty: it was not.
        rounding: largest difference that this makes between logits of the trained model and of what is written.
        gated: whether a gate that PEFT does not know lies beside the adapter.
    """

    kind: str
    loader: str
    difference: float
    allowed: float
    largest: float
    quantised: str = ""
    rounding: float = 0.0
    gated: bool = False


def export(name: str, out: str | Path, *, merge: bool = False) -> Exported:
    """Write the model or the adapter of a run as a folder of its own.

    Args:
        name: the folder of a run; with `merge` also that of a PEFT adapter.
        out: a folder that is not there or empty.
        merge: add the adapter into the weights, in the base model's dtype, so that no adapter library is needed. Where
            the base was quantised, they are loaded again and not quantised.

    Raises:
        InputError: `name` or `out` cannot be used, there is nothing to merge, or the run's checkpoint is damaged.
        StorageError: the disk refused.
        FalllineError: what was written does not compute what was trained.
        Whatever is raised, nothing is left at `out`.
    """
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{out} is there already and not empty; choose another folder")
    trained = open_trained(name, "cpu")
    if merge and not trained.adapter:
        raise InputError(f"{name} has no adapter to merge; leave out --merge")
    if not merge and not (Path(name) / "run.json").is_file():
        more = ", or add --merge" if trained.adapter else ""
        raise InputError(f"{name} is no run, there is nothing to take out; copy it as it is{more}")
    hidden = target.with_name(f".{target.name}.exporting")
    try:
        with files.plain_errors(), quietly():
            shutil.rmtree(hidden, ignore_errors=True)  # of a killed export
            hidden.mkdir(parents=True)
            made = write(trained, hidden, merge)
            for path in (*hidden.rglob("*"), hidden):
                files.sync_folder(path)
            hidden.rename(target)
            files.sync_folder(target.parent)
    except OSError as error:
        where = error.filename2 or error.filename or target.parent
        what = str(error) if error.errno is None else f"{error.strerror} ({where})"
        raise StorageError(f"exporting to {out} failed: {what}; nothing was left there") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return made


def write(trained: Trained, folder: Path, merge: bool) -> Exported:
    """Fill an empty folder, load it and compare.

    Raises:
        InputError, OSError, FalllineError: see `export`.
    """
    model: Any = trained.model
    ids = probe(model, len(trained.tokenizer))
    expected = logits(model, ids)
    quantised, coarse = kind_of(model) or "", expected
    with_gate = gated(model)
    if quantised:
        trained = in_full(trained)
        model = trained.model
        expected = logits(model, ids)
    largest = float(expected.abs().max())
    rounding = TOLERANCE.get(model.dtype, 0.0) * largest
    if trained.adapter:  # a part of what it does, so that a lost adapter is no rounding; but not less than float32's
        with adapters.disabled(model):
            effect = float((logits(model, ids) - expected).abs().max())
        rounding = min(rounding, max(effect / 4, 1e-5 * largest))
    if merge:
        adapters.merge(model)
        adapters.remove(model)
        model.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
        readable(folder)
    else:
        assert trained.folder is not None
        copy(trained.folder, folder)
    if trained.adapter and not merge:
        kind, allowed = "adapter", rounding
        adapters.remove(model)
        loader, again = ("Fallline", adapters.load(model, folder)) if with_gate else attach(model, folder)
    else:
        kind, allowed, loader = ("merged model", rounding, "Transformers") if merge else ("model", 0.0, "Transformers")
        again = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    difference = float((logits(again, ids) - expected).abs().max())
    if not difference <= allowed:
        raise FalllineError(
            f"what was written does not compute what {trained.name} does: a logit differs by {difference:.2g} and may "
            f"by {allowed:.2g}; it was removed"
        )
    coarsened = float((expected - coarse).abs().max())
    return Exported(kind, loader, difference, allowed, largest, quantised, coarsened, with_gate)


def copy(source: Path, folder: Path) -> None:
    """Copy the model's folder of a checkpoint, and read the copy.

    Raises:
        InputError: the checkpoint is damaged.
        OSError: the disk refused, or reads something else than was written.
    """
    source = source.resolve()
    if source.parent.parent.name == "checkpoints":  # elsewhere it is a copy, without checksums beside it
        checkpoint.verify(source.parent, below="model/")
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        new = folder / path.relative_to(source)
        new.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, new)
        if files.seal(path) != files.seal(new):
            raise OSError(f"the copy of {path} is not equal to it")


def attach(base: Any, folder: Path) -> tuple[str, Any]:
    """An adapter on its base, by PEFT where that is installed; and by which.

    Raises:
        FalllineError: PEFT does not take it.
    """
    try:
        from peft import PeftModel
    except ImportError:
        return "Fallline", adapters.load(base, folder)
    try:
        return "PEFT", PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # of a library of strangers
        raise FalllineError(f"PEFT does not load what was written: {' '.join(str(error).split())}") from error


def probe(model: Any, words: int) -> Tensor:
    """[1, T] tokens to ask a model with."""
    length = min(TOKENS, positions(model) or TOKENS)
    return torch.randint(words, (1, length), generator=rng(0, 0, "export"))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """[1, T, V] float32."""
    found: Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    return found
