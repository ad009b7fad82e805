"""Open what was trained: the model of a run, a 🤗 folder, an adapter with its base, or a model by its name."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .. import adapters, checkpoint
from ..adapters.peft import CONFIG as ADAPTER
from ..catalog import entries, find
from ..data.dataset import Dataset
from ..errors import InputError, nearest
from ..models.base import ModelOptions
from ..models.identity import fingerprint
from ..models.loading import configuration, has_sdpa, load_model, load_tokenizer, loading, quietly
from ..optim.precision import DTYPES
from ..recipe import Recipe
from .setting import pick_device

Opened = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Trained:
    """A model to use.

    Attributes:
        name: what it was opened by.
        model: in evaluation mode, in the dtype that its weights are stored in.
        tokenizer: that belongs to it.
        folder: where it was found, a 🤗 folder or a PEFT adapter's; None: a model of the catalogue or of the 🤗 hub.
        adapter: whether that is an adapter; it is attached to `model`, not merged.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None
    adapter: bool = False


class Record(NamedTuple):
    """What a run wrote down of its beginning.

    Attributes:
        whole: all of run.json.
        dtype: of the weights.
        model, data: SHA-256 of what it began with.
    """

    whole: dict[str, Any]
    dtype: torch.dtype
    model: str
    data: str


def open_trained(name: str, device: str = "auto") -> Trained:
    """Open a model to use it.

    Args:
        name: the folder of a run (finished: its model; else its newest good checkpoint), a 🤗 model folder, the folder
            of a PEFT adapter, a model of the catalogue that needs no options, or a 🤗 hub id.
        device: as in a recipe.

    Raises:
        InputError: no such model or device, a run without a checkpoint, or an adapter whose base has changed since.
    """
    with quietly():
        return _open(name, pick_device(device))


def _open(name: str, place: torch.device) -> Trained:
    path = Path(name)
    if (path / "run.json").is_file():
        folder = model_of(path)
        if (folder / ADAPTER).is_file():
            return _adapted(name, folder, base_of_run(path, folder, place))
        opened = load(str(folder), place)
    elif (path / ADAPTER).is_file():
        folder = path
        return _adapted(name, folder, base_of_adapter(folder, place))
    else:
        folder = path
        opened = by_name(name, place)
    return Trained(name, opened[0].eval(), opened[1], folder if folder.is_dir() else None)


def model_of(run: Path) -> Path:
    """The model's folder of a run: that of its end, else of the newest checkpoint that verifies.

    Raises:
        InputError: there is no checkpoint, or that of the end is damaged.
    """
    final = run / "model"
    if any((final / name).is_file() for name in ("config.json", ADAPTER)):
        if final.is_symlink():  # a copy of it elsewhere has no checksums beside it
            checkpoint.verify(final.resolve().parent, below="model/")
        return final
    saved = checkpoint.latest_good(run)
    if saved is None:
        raise InputError(f"{run} has no checkpoint to open; continue the run first: fallline train {run} --resume")
    return saved.path / "model"


def by_name(name: str, device: torch.device) -> Opened:
    """A model of the catalogue, else a 🤗 folder or hub id.

    Raises:
        InputError: no such model.
    """
    if ("model", name) in entries():
        module = find("model", name).load()
        if not module.Config.brings_tokenizer:
            raise InputError(f"model {name!r} begins untrained; give a run folder, a 🤗 folder or hub id")
        config = module.Config.from_mapping({}, f"model {name!r}")
        tokenizer = module.tokenizer(config)
        model = module.build(config, tokenizer=tokenizer, length=1, seed=0, dtype=torch.float32, device=device)
        return model, tokenizer
    path = Path(name)
    if not path.exists():
        runs = [str(p.parent) for p in path.parent.glob("*/run.json")]
        if runs:
            raise InputError(f"there is no run {name!r}; {nearest(name, runs)}")
        if path.parts[0] in ("runs", "..", "/") or (len(path.parts) > 1 and path.parent.is_dir()):
            raise InputError(f"there is no run or model folder {name!r}")
        if "/" not in name:
            known = [id for (kind, id), entry in entries().items() if kind == "model"]
            raise InputError(f"there is no folder or model {name!r}; {nearest(name, known)}; a hub id is owner/name")
    return load(name, device)


def load(path: str, device: torch.device) -> Opened:
    """A 🤗 folder or hub id, in the dtype its configuration says.

    Raises:
        InputError: it cannot be loaded.
    """
    tokenizer = load_tokenizer(path)
    told = configuration(path)
    dtype = getattr(told, "dtype", None) or getattr(told.get_text_config(), "dtype", None) or torch.float32

    options = ModelOptions(attention="sdpa" if has_sdpa(told) else "eager")
    return load_model(path, options, tokenizer=tokenizer, length=1, dtype=dtype, device=device), tokenizer


def in_full(trained: Trained) -> Trained:
    """A run's adapter on its base as it was before it was quantised, on the CPU.

    Args:
        trained: opened by the run's folder, its base quantised.

    Raises:
        InputError: the base cannot be loaded.
    """
    assert trained.folder is not None
    base = base_of_run(Path(trained.name), trained.folder, torch.device("cpu"), quantised=False)
    return _adapted(trained.name, trained.folder, base)


def base_of_run(run: Path, folder: Path, device: torch.device, *, quantised: bool = True) -> Opened:
    """The model that a run began with, and put its adapter on if it has one, built as the run built it.

    Args:
        run, folder: the run's folder, and that of its adapter. device: where to.
        quantised: as it was; otherwise its weights as they were before that, which no hash is known of.

    Raises:
        InputError: it cannot be built, or is not what it was; run.json is damaged.
    """
    record = record_of_run(run)
    recipe = Recipe.load(run)
    module = recipe.model.module
    options = replace(recipe.model.options, checkpointing=False, compile=False)  # these are for training
    if not quantised:
        options = replace(options, quantise=None)
    tokenizer = _tokenizer(folder) or module.tokenizer(options)
    length, seed = recipe.data.options.length, recipe.settings.seed
    model = module.build(options, tokenizer=tokenizer, length=length, seed=seed, dtype=record.dtype, device=device)
    if quantised and fingerprint(model) != record.model:
        base = getattr(options, "path", recipe.model.id)
        raise InputError(f"the model {base!r} that {run} began with has changed since; bring the old one back")
    return model, tokenizer


def data_of_run(run: Path) -> Dataset:
    """The data that a run trained on, made as the run made it.

    Raises:
        InputError: not a run, or its data is gone or has changed since; run.json is damaged.
    """
    record = record_of_run(run)
    recipe = Recipe.load(run)
    brought = recipe.model.module.tokenizer(recipe.model.options)
    dataset: Dataset = recipe.data.module.build(recipe.data.options, brought)
    if dataset.fingerprint != record.data:
        raise InputError(f"the data of {run} has changed since it was trained; bring the old data back")
    return dataset


def record_of_run(run: Path) -> Record:
    """What a run wrote down when it began.

    Raises:
        InputError: there is no run.json, or it is damaged.
    """
    path = run / "run.json"
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        return Record(whole, DTYPES[whole["precision"]], whole["model"]["sha256"], whole["data"]["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run} is not the folder of a run: there is no run.json, which tells how it was trained"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r})") from None


def base_of_adapter(folder: Path, device: torch.device) -> Opened:
    """The model that a PEFT adapter names as its base.

    Raises:
        InputError: it names none, or that cannot be opened.
    """
    path = folder / ADAPTER
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error})") from None
    if not base:
        raise InputError(f"{path} does not say which model it is for; write its folder as 'base_model_name_or_path'")
    try:
        model, tokenizer = by_name(base, device) if ("model", base) in entries() else load(base, device)
    except InputError as error:
        raise InputError(f"{error} (the base model in {path})") from None
    return model, _tokenizer(folder) or tokenizer


def _adapted(name: str, folder: Path, base: Opened) -> Trained:
    model, tokenizer = base
    adapters.load(model, folder)
    return Trained(name, model.eval(), tokenizer, folder, adapter=True)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside an adapter, if there is one."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    with loading("tokenizer", str(folder)):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return found
