"""Score the training examples of runs, so that a sampler can choose among them.

    s_i = 1/R Σ_r s(example i, model of run r)

- `el2n`: ‖softmax(z) − e_y‖₂, averaged over the labels of the example;
- `grand`: ‖∇ of the example's mean loss per label‖₂, over all the parameters that the run trained;
- `loss`: the example's mean loss per label, nats.

Each run's model is that of its end, or of its newest good checkpoint, in evaluation mode and float32. Examples without
a label get NaN. The gradient of a mean over few labels is long, so GraNd ranks short examples high: where lengths
differ much, as in packed text, it is almost the order of the lengths.

EL2N and the loss cost a forward of all examples, GraNd a forward and a backward.

Source: Paul, Ganguli and Dziugaite, Deep Learning on a Data Diet, 2021, definitions 2.1 and 2.2; there R = 10 runs of
different seeds, scored after a tenth of the epochs or less.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..adapters.gated import refuse_gated
from ..checkpoint import files
from ..contracts import Batch
from ..data.scores import examples_hash
from ..errors import InputError, NonFiniteError, StorageError, nearest
from ..per_example import Norms, PerExample
from ..token_errors import token_errors
from ..tokens import label_counts, mean_losses, per_example
from .trained import data_of_run, open_trained

Rule = Callable[[Batch], Tensor]
"""A batch's scores, [B], of a model; where there is no label, anything."""


@dataclass(frozen=True)
class Scores:
    """What `score` found.

    Attributes:
        values: [N] float32 by example id, NaN for examples without a label.
        metadata: of the file; see `data.scores`.
    """

    values: Tensor
    metadata: dict[str, str]


def el2n(model: nn.Module) -> Rule:
    """The mean EL2N per label."""
    return lambda batch: per_example(token_errors(model, batch), batch) / label_counts(batch).clamp(min=1)


def loss(model: nn.Module) -> Rule:
    """The mean loss per label, nats."""
    return torch.no_grad()(lambda batch: mean_losses(model, batch))


def grand(model: nn.Module) -> Rule:
    """The norm of the gradient of the mean loss per label."""
    engine = PerExample(model)

    def rule(batch: Batch) -> Tensor:
        norms = Norms()
        with engine.watch(batch, norms):
            mean_losses(model, batch).sum().backward()
        model.zero_grad()
        return norms.total().sqrt()

    return rule


RULES: Mapping[str, Callable[[nn.Module], Rule]] = {"el2n": el2n, "grand": grand, "loss": loss}


def score(runs: Sequence[str], by: str, *, rows: int = 8, device: str = "auto") -> Scores:
    """Scores of all training examples, averaged over runs of the same data.

    Args:
        runs: folders of runs. by: a key of `RULES`.
        rows: packed rows at a time. device: as in a recipe.

    Raises:
        InputError: no such score, not a run, one given twice, one whose data has changed since, runs of different data,
            or a layer whose gradient cannot be had by examples.
        NonFiniteError: a score is not finite.
    """
    if by not in RULES:
        raise InputError(f"there is no score {by!r}; {nearest(by, RULES)}")
    if rows < 1:
        raise InputError(f"a batch needs at least 1 row, got {rows}")
    folders = [Path(run) for run in runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run is given twice; scores are averaged over different runs")
    data = [data_of_run(folder) for folder in folders]
    source, examples = data[0].train, [examples_hash(each.train) for each in data]
    for folder, hashed in zip(folders, examples, strict=True):
        if hashed != examples[0]:
            raise InputError(f"{folder} and {folders[0]} have different training examples: the same data is needed")
    asked = torch.cat([label_counts(batch) for batch in source.batches(rows)]) > 0
    total = torch.zeros(len(source), dtype=torch.float64)
    for folder in folders:
        model = open_trained(str(folder), device).model.float()
        refuse_gated(model, str(folder), "a score of examples")
        rule, place = RULES[by](model), next(model.parameters()).device
        for batch in source.batches(rows):
            found = rule({name: column.to(place) for name, column in batch.items()}).detach().cpu()
            ids = batch["example_id"]
            if bool((wrong := ~found.isfinite() & asked[ids]).any()):
                raise NonFiniteError(f"{folder}: the {by} of example {int(ids[wrong][0])} is not finite")
            total[ids] += found
    values = (total / len(folders)).masked_fill(~asked, torch.nan)
    told = {
        "examples": examples[0],
        "data": data[0].fingerprint,
        "by": by,
        "runs": json.dumps(list(map(str, runs))),
        "mean": str(values[asked].mean().item()),
        "sd": str(values[asked].std(correction=0).item()),
    }
    return Scores(values.float(), told)


def check_new(path: Path) -> None:
    """Refuse to write over scores.

    Raises:
        InputError: the file is there already.
    """
    if path.exists():
        raise InputError(f"--out: {path} is there already; choose another name or remove it")


def write(scores: Scores, path: Path) -> None:
    """Write scores into a new file, all or nothing.

    Raises:
        InputError: it is there already.
        StorageError: the disk refused.
    """
    check_new(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        files.write(temporary, iter([save({"scores": scores.values}, scores.metadata)]))
        temporary.replace(path)
        files.sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
