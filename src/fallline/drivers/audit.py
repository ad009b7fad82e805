"""Audit: how well can be told from a trained model which examples it was trained on."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..adapters.gated import refuse_gated
from ..adapters.layers import activate, disabled, names
from ..catalog import entries, find
from ..errors import InputError, NonFiniteError, StorageError, check_package
from ..metrics.roc import auc, curve, tpr_at
from ..models.identity import fingerprint
from ..models.loading import quietly
from ..per_example import Norms, PerExample, Sketch
from ..probes.attack import SKETCH, Attack, Floats, Seen, blind
from ..recipe import Recipe
from ..report.audit import page
from ..tokens import mean_losses
from .audit_examples import Examples, read_examples, read_training
from .folder import write_text
from .setting import VERSIONS, processor
from .trained import Trained, base_of_run, open_trained, record_of_run

FPR = (0.01, 0.001)
"""False positive rates at which true positives are counted."""


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        out: the folder with `audit.json` and `audit.html`.
        record: what is in `audit.json`.
    """

    out: Path
    record: dict[str, Any]


def audit(
    run: str | Path,
    members: str,
    non_members: str,
    *,
    methods: Sequence[str] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    batch: int = 8,
    command: str = "",
) -> Audit:
    """Attack the model of a run, and write what came of it.

    Beside the attacks there are always two baselines: ``loss``, the negative loss, and ``blind``, which sees the words
    and lengths and no model. Where the run's data can be read again, members must be of it, and the others not.

    Args:
        run: its folder.
        members: JSON Lines the run was trained on. non_members: such as it was not, of the same distribution.
        methods: of kind ``audit``; None takes all.
        out: folder for `audit.json` and `audit.html`, replaced when they are there; None: ``RUN/audit``.
        device: as in a recipe.
        batch: packed rows in a forward.
        command: what was typed, for the record.

    Raises:
        InputError: something that cannot be used, in one line; nothing was written.
        NonFiniteError: the model's loss or gradient on an example is not finite.
        StorageError: the disk refuses.
    """
    if batch < 1:
        raise InputError(f"--batch must be at least 1, got {batch}")
    run = Path(run)
    began = record_of_run(run)
    attacks = pick(methods)
    check_package("sklearn", "audit")
    out = writable(run / "audit" if out is None else Path(out))
    recipe = Recipe.load(run)
    trained = open_trained(str(run), device)
    refuse_gated(trained.model, str(run), "an audit")
    assert trained.folder is not None
    training, said = read_training(recipe, run, trained.folder)
    examples = read_examples(recipe, members, non_members, trained.tokenizer, training)
    content = fingerprint(trained.model)
    device = str(trained.model.device)
    seen = look(trained, run, examples, batch, frozenset().union(*(attack.reads for attack in attacks.values())))
    member = examples.member
    scores = {id: attack.score(seen, member) for id, attack in attacks.items()}
    scores |= {"loss": -seen.loss, "blind": blind(examples.text, examples.lengths, member)}
    results = [result(id, score, member) for id, score in scores.items()]
    record = {
        "format": 1,
        "fallline": __version__,
        "command": command or None,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run": str(run),
        "model": {"sha256": content, "adapter": trained.adapter},
        "trained_as": began.whole,
        "versions": {name: version(name) for name in (*VERSIONS, "scikit-learn")},
        "machine": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": processor(),
            "device": device,
            "threads": torch.get_num_threads(),
        },
        "files": examples.files,
        "length": recipe.data.options.length,
        "loss": {"members": float(seen.loss[member].mean()), "non_members": float(seen.loss[~member].mean())},
        "results": results,
        "remarks": said + remarks(recipe, examples, results),
        "scores": [
            {"where": where, "member": bool(is_member)} | {id: float(score[i]) for id, score in scores.items()}
            for i, (where, is_member) in enumerate(zip(examples.where, member, strict=True))
        ],
    }
    curves = {id: tuple(c.tolist() for c in curve(score, member)) for id, score in scores.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "audit.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        write_text(out / "audit.html", page(record, curves))
    except OSError as error:
        raise StorageError(f"cannot write the audit into {out}: {error.strerror or error}") from error
    return Audit(out, record)


def pick(methods: Sequence[str] | None) -> dict[str, Attack]:
    """The attacks of these names, built; None: all of the catalogue.

    Raises:
        InputError: a name that is no attack, or none at all.
    """
    ids = [id for kind, id in entries() if kind == "audit"] if methods is None else list(dict.fromkeys(methods))
    if not ids:
        raise InputError("--methods names no method; such as --methods mia-gradnorm,mia-flora")
    modules = {id: find("audit", id).load() for id in ids}
    return {id: module.build(module.Config()) for id, module in modules.items()}


def writable(out: Path) -> Path:
    """A folder that can be written or made, as far as can be told before.

    Raises:
        InputError: it cannot.
    """
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--out: cannot write a folder {out}")
    return out


def look(trained: Trained, run: Path, examples: Examples, rows: int, reads: frozenset[str]) -> Seen:
    """What the attacks read of the model: in evaluation mode and float32.

    The model is float32 afterwards.

    Args:
        trained: of the run. run: its folder, from which the base model is built again where there is no adapter.
        rows: packed rows in a forward. reads: fields of `Seen`.

    Raises:
        InputError: the base model cannot be built, or is not what it was; a layer whose per-example gradients are not
            known.
        NonFiniteError: a loss or gradient is not finite.
    """
    found: dict[str, Any] = {}
    if "base_loss" in reads:  # first: the slow passes are in vain where the base is another by now
        found["base_loss"] = base_losses(trained, run, examples, rows)
    model = trained.model.float()
    if trained.adapter:
        activate(model, *names(model))
    else:
        model.requires_grad_(True)
    loss = losses(model, examples, rows)
    if reads & {"squared", "sketch"}:
        found |= gradients(model, examples, rows, sketch="sketch" in reads)
    return Seen(loss, **found)


def base_losses(trained: Trained, run: Path, examples: Examples, rows: int) -> Floats:
    """`losses` under the model that the run began with: the trained one without its adapter, or one built again.

    Raises:
        InputError: it cannot be built, or is not what it was.
    """
    if trained.adapter:
        with disabled(trained.model.float()):
            return losses(trained.model, examples, rows)
    assert trained.folder is not None
    with quietly():
        base = base_of_run(run, trained.folder, trained.model.device)[0]
    return losses(base.float().eval(), examples, rows)


@torch.no_grad()
def losses(model: nn.Module, examples: Examples, rows: int) -> Floats:
    """Each example's mean negative log-likelihood, [N] nats a label.

    Raises:
        NonFiniteError: one is not finite.
    """
    found = np.empty(len(examples.where))
    for which, batch in examples.batches(rows):
        found[which] = mean_losses(model, _moved(batch, model)).cpu().numpy()
    return _finite(found, "loss", examples)


def gradients(model: nn.Module, examples: Examples, rows: int, *, sketch: bool) -> dict[str, dict[str, Floats]]:
    """`Seen.squared`, and with `sketch` also `Seen.sketch`, of the parameters that require gradients.

    Raises:
        InputError: the model has a layer whose per-example gradients are not known.
        NonFiniteError: one is not finite.
    """
    engine, norms, projected = PerExample(model), Norms(), Sketch(size=SKETCH)
    found: dict[str, dict[str, Floats]] = {"squared": {}, "sketch": {}} if sketch else {"squared": {}}
    for which, batch in examples.batches(rows):
        moved = _moved(batch, model)
        with engine.watch(moved, *((norms, projected) if sketch else (norms,))):
            mean_losses(model, moved).sum().backward()
        model.zero_grad(set_to_none=True)
        read: list[tuple[str, Mapping[str, Tensor]]] = [("squared", norms.squared)]
        if sketch:
            read.append(("sketch", projected.by_parameter))
        for field, values in read:
            for name, value in values.items():
                whole = found[field].setdefault(name, np.zeros((len(examples.where), *value.shape[1:])))
                whole[which] = value.detach().double().cpu().numpy()
    _finite(np.sum(list(found["squared"].values()), axis=0), "gradient", examples)
    return found


def _moved(batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {name: column.to(model.device) for name, column in batch.items()}


def _finite(values: Floats, what: str, examples: Examples) -> Floats:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise NonFiniteError(f"the model's {what} on {examples.where[bad[0]]} is not finite; nothing was written")
    return values


def result(id: str, score: Floats, member: Any) -> dict[str, Any]:
    """How well a score tells members: area and true positive rates, each [value, low, high]."""
    return {
        "method": id,
        "auc": list(auc(score, member)),
        "tpr": [{"fpr": fpr, "value": list(tpr_at(score, member, fpr)), "needs": round(10 / fpr)} for fpr in FPR],
    }


def remarks(recipe: Recipe, examples: Examples, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to keep in mind, in sentences."""
    found = []
    _, low, _ = next(r["auc"] for r in results if r["method"] == "blind")
    if low > 0.5:
        found.append(
            "Members and non-members can be told apart by their words and lengths alone (blind): what the other rows "
            "show is not memory alone."
        )
    used = {side: tally["used"] for side, tally in examples.files.items()}
    for tpr in results[0]["tpr"]:
        if used["non_members"] < tpr["needs"]:
            found.append(
                f"The TPR at {100 * tpr['fpr']:g} % FPR needs {tpr['needs']} non-members, there are "
                f"{used['non_members']}."
            )
    if not recipe.model.module.Config.brings_tokenizer and any(r["method"] == "mia-flora" for r in results):
        found.append("The run began with random weights: those are the base of mia-flora, which is then near to loss.")
    told: dict[str, Callable[[int], str]] = {
        "left_out": lambda n: f"{n} without a label left out",
        "held_out": lambda n: f"{n} that the run held out for validation left out",
        "cut": lambda n: f"{n} judged by the first {recipe.data.options.length} tokens",
        "repeated": lambda n: f"{n} that repeat another left out",
        "never_drawn": lambda n: f"{n} that no step of the run drew",
    }
    for side, tally in examples.files.items():
        said = [words(tally[key]) for key, words in told.items() if tally[key]]
        if said:
            found.append(f"Of {tally['lines']} {side.replace('_', '-')}: {', '.join(said)}.")
    return found
