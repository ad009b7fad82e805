"""From a recipe to parts: data, tokenizer, model, and the run that holds them."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..adapters.begin import Begin
from ..adapters.between import Between
from ..adapters.layers import adapted, disabled, follow, given, inject, refuse_gradients
from ..errors import InputError
from ..isolation import check_isolation
from ..metrics import Clock
from ..models.identity import fingerprint
from ..optim.base import Named
from ..optim.precision import DTYPES, low_precision, pick_precision
from ..quantised import count
from ..ranks import world
from ..recipe import Recipe
from ..reference import Reference
from ..step import Run
from .evaluation import check_measures
from .plan.check import check

VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass
class Setting:
    """A recipe made into parts, before step 0."""

    recipe: Recipe
    run: Run
    dataset: Any
    clock: Clock
    record: dict[str, Any]
    others: dict[str, Any]  # name → what is evaluated beside the validation data


def pick_device(name: str) -> torch.device:
    """`name` as a device that is there.

    Raises:
        InputError: no such device, or none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError):
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise InputError(f"device {name!r} is not available here; there is {', '.join(here)}") from None
    if device.type == "meta":
        raise InputError("device 'meta' holds no values; use cpu or cuda")
    return device


def build(recipe: Recipe, *, check_memory: bool = False, force: bool = False) -> Setting:
    """Load data and model and put the parts together. Nothing is written but caches.

    Args:
        recipe: what to build.
        check_memory: before the model is loaded, refuse what will not fit into the memory at hand, and save where it is
            scarce.
        force: refuse nothing for want of memory.

    Raises:
        InputError: whatever cannot be used, in one line.
    """
    settings = recipe.settings
    device = pick_device(settings.device)
    precision = pick_precision(settings.precision, device.type)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    clock = Clock(device)
    adapter = recipe.adapter.module.build(recipe.adapter.options)
    quantised = getattr(recipe.model.options, "quantise", None) is not None
    if adapter is not None and quantised:
        refuse_gradients(adapter)

    brought = recipe.model.module.tokenizer(recipe.model.options)
    dataset = recipe.data.module.build(recipe.data.options, brought)
    check_measures(dataset.validation, recipe.eval.measures)
    others = {name: data.module.build(data.options, dataset.tokenizer) for name, data in recipe.also.items()}
    if check_memory:
        chosen, length = recipe.model, recipe.data.options.length
        check(recipe, chosen.module.architecture(chosen.options, dataset.tokenizer, length), device, force=force)
    model = recipe.model.module.build(
        recipe.model.options,
        tokenizer=dataset.tokenizer,
        length=recipe.data.options.length,
        seed=settings.seed,
        dtype=DTYPES[precision],
        device=device,
    )
    content, size = fingerprint(model), count(model)
    if adapter is not None:
        adapter.check_base(content)
        inject(model, adapter, seed=settings.seed)
    check_isolation(model)
    model.train()
    objective = recipe.objective.module.build(recipe.objective.options).to(device)
    reference = None
    if getattr(objective, "reference", False):  # now: whatever is loaded into the model later is not its beginning
        reference = Reference(model, content, None if adapter is None else disabled)
    chosen_later = bool(getattr(objective, "parts", None))  # they choose what is trained before step 0
    estimator = recipe.estimator.module.build(recipe.estimator.options)
    sampler = recipe.sampler.module.build(
        recipe.sampler.options, dataset.train, rows=settings.batch, seed=settings.seed
    )
    own = [(f"objective.{name}", p) for name, p in objective.named_parameters()]

    def make(params: Any) -> Named:
        optimizer: Named = recipe.optimizer.module.build(recipe.optimizer.options, params, seed=settings.seed)
        return optimizer

    optimizer = low_precision(make, model, own, precision, seed=settings.seed)
    follow(model, optimizer)
    schedule = recipe.schedule.module.build(recipe.schedule.options, optimizer, steps=settings.steps)
    acts: dict[str, Any] = {}
    if adapter is not None:
        part = adapter.part() or (Begin() if adapter.needs else Between() if adapter.between else None)
        acts |= {} if part is None else {"adapter": part}
    run = Run(
        model=model,
        objective=objective,
        source=dataset.train,
        sampler=sampler,
        estimator=estimator,
        optimizer=optimizer,
        schedule=schedule,
        micro=settings.micro or settings.batch,
        seed=settings.seed,
        steps=settings.steps,
        parts=acts | {p.id: p.module.build(p.options) for p in recipe.probes},
        clip=settings.clip,
        coefficients={} if adapter is None else dict(adapter.coefficients(len(adapted(model)))),
        device=device,
        clock=clock,
        given=given(model),
        reference=reference,
    )
    record = {
        "fallline": __version__,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (*VERSIONS, *(["bitsandbytes"] if quantised else []))},
        "platform": platform.platform(),
        "processor": processor(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "ranks": world(),
        "precision": precision,
        "seed": settings.seed,
        "data": {"name": recipe.data.id, "sha256": dataset.fingerprint} | dataset.summary,
        "tokenizer": {"sha256": tokenizer_hash(dataset.tokenizer)},
        "model": {
            "sha256": content,
            "parameters": size,
            "trained": None if chosen_later else sum(p.numel() for p in model.parameters() if p.requires_grad),
            "architecture": type(model).__name__,
        },
    }
    if hasattr(estimator, "record"):
        record |= estimator.record()
    if others:
        record["also"] = {name: {"sha256": other.fingerprint} for name, other in others.items()}
    return Setting(recipe, run, dataset, clock, record, {name: other.validation for name, other in others.items()})


def tokenizer_hash(tokenizer: Any) -> str:
    """Of all that a tokenizer does, where it is a fast one; of its vocabulary otherwise."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(tokenizer.get_vocab(), sort_keys=True) if fast is None else fast.to_str()
    return hashlib.sha256(text.encode()).hexdigest()


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    return next((row.split(":")[1].strip() for row in rows if "model name" in row), platform.processor())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
