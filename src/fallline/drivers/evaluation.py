"""What a run's model is worth on data that it does not train on.

That is the validation loss, and measures that do not depend on the objective:

    nll       Σ −log p / number of labels, nats a token: what `causal` is trained by
    exact     the part of the examples that greedy decoding answers to the letter (`token_scores`)
    pass@N    the chance that one of N sampled answers is the example's to the letter, 1 − (1 − p)^N with p the
              probability of its labels, averaged over examples: no sampling is needed
    rejected  nll of the second sequences of pairs; the others are of the first ones

An example of which no label is asked has no part in them. Of data with streams each is measured by itself: forget/nll,
retain/nll.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..batches import no_rows
from ..contracts import STREAMS, Batch
from ..errors import InputError
from ..noise import seed_forward
from ..objectives.causal import Causal
from ..sequences import per_sequence, sequence_counts
from ..step import Run
from ..token_scores import token_scores
from ..tokens import per_example


class Measures:
    """Sums over batches, of which `values` makes what `names` ask for."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._sums: dict[str, Tensor] = {}

    def add(self, scores: Tensor, batch: Batch) -> None:
        """One batch more; `scores` [2, R, L] are its `token_scores`."""
        count = sequence_counts(batch)
        value, first = (per_sequence(s.double(), batch) for s in scores)
        asked = count > 0
        told = {
            "nll": (value[:, 0], count[:, 0]),
            "exact": ((first == count)[:, 0] & asked[:, 0], asked[:, 0]),
            "rejected": (value[:, 1], count[:, 1]),
        }
        for name in self.names:
            if name.startswith("pass@"):
                told[name] = passed(value[:, 0], int(name.removeprefix("pass@"))) * asked[:, 0], asked[:, 0]
            for stream, of_stream in streams(batch).items():
                both = torch.stack([(part * of_stream).double().sum() for part in told[name]])
                self._sums[stream + name] = self._sums.get(stream + name, 0) + both

    def values(self) -> dict[str, float]:
        """What was asked for, by name; nothing of a stream without examples."""
        return {name: float(value / count) for name, (value, count) in self._sums.items() if count > 0}


def streams(batch: Batch) -> dict[str, Tensor]:
    """What is put before the names of measures of each stream of a batch, and which examples [B] are of it."""
    if "domain" not in batch:
        return {"": torch.ones_like(batch["example_id"], dtype=torch.bool)}
    return {f"{name}/": batch["domain"] == code for code, name in STREAMS.items()}


def passed(s: Tensor, samples: int) -> Tensor:
    """1 − (1 − e^{−s})^N, of any shape: the chance that one of N samples is what has −log p = s."""
    return -torch.expm1(samples * torch.log1p(-torch.exp(-s)))


def evaluate(run: Run, source: Any, rows: int | None, into: Measures | None = None) -> float:
    """The validation loss, per counted token: Σ values / Σ counts for each term, added up.

    The objective prepares each batch as in a step, from a run whose source is the validation data.

    Args:
        run: gives model, objective and micro-batch size; its weights to evaluate are `optimizer.evaluated()`.
        source: validation data. rows: how many of its rows; None takes all.
        into: is given the scores of the same rows. They are also `causal`'s loss, which then needs no other forward.
    """
    value: dict[str, Tensor] = {}
    count: dict[str, Tensor] = {}
    prepare = getattr(run.objective, "prepare", None)
    asking = copy(run)
    asking.source = source
    with evaluating(run):
        for number, batch in enumerate(batches(run, source, rows)):
            moved = batch
            if prepare is not None:
                seed_forward(run.seed, run.step, f"evaluate/{number}", run.device)
                moved = prepare(asking, batch)
            scores = None
            if into is not None and into.names:
                scores = token_scores(run.model, batch)
                into.add(scores, batch)
            for term, c in run.objective.count(moved).items():
                count[term] = count.get(term, torch.zeros((), device=run.device)) + c.sum()
            if scores is not None and isinstance(run.objective, Causal) and "token_weight" not in moved:
                values = {run.objective.term: per_example(scores[0], batch)}
            else:
                values = run.objective(run.model, moved).value
            for term, v in values.items():
                value[term] = value.get(term, torch.zeros((), device=run.device)) + v.double().sum()
        return float(sum((v / count[term].clamp(min=1)).item() for term, v in value.items()))


def measure(run: Run, source: Any, rows: int | None, names: Sequence[str]) -> dict[str, float]:
    """Measures alone; see `evaluate` for the arguments."""
    into = Measures(names)
    with evaluating(run):
        for batch in batches(run, source, rows):
            into.add(token_scores(run.model, batch), batch)
    return into.values()


def evaluation(run: Run, source: Any, rows: int | None, names: Sequence[str], others: Mapping[str, Any]) -> Batch:
    """What an evaluation adds to a record: `val_loss`, and `measures`, name → value, where any are asked for.

    Args:
        run, source, rows: see `evaluate`. names: of the measures.
        others: name → other validation data, of which the measures are NAME/MEASURE; nll where none else is asked for.
    """
    into = Measures(names)
    found: dict[str, Any] = {"val_loss": evaluate(run, source, rows, into)}
    measures = into.values()
    for name, other in others.items():
        of_other = measure(run, other, rows, of_others(names))
        measures |= {f"{name}/{m}": value for m, value in of_other.items()}
    return found | ({"measures": measures} if measures else {})


def of_others(names: Sequence[str]) -> list[str]:
    """The measures of data that is not the run's."""
    return [name for name in names if name != "rejected"] or ["nll"]


def check_measures(source: Any, names: Sequence[str]) -> None:
    """Refuse what the validation data does not have.

    Raises:
        InputError: `rejected` was asked for, and the data has no pairs.
    """
    if "rejected" in names and "side" not in no_rows(source):
        raise InputError("eval: the measure 'rejected' is of pairs, and the data has none; leave it out")


@contextmanager
def evaluating(run: Run) -> Iterator[None]:
    """Inside, the model has the weights to evaluate, no dropout and no gradients."""
    training = run.model.training
    run.model.eval()
    try:
        with torch.no_grad(), run.clock("eval"), run.optimizer.evaluated():
            yield
    finally:
        run.model.train(training)


def batches(run: Run, source: Any, rows: int | None) -> Iterator[Batch]:
    """Rows of a source on the run's device, as many at a time as in its forwards."""
    for batch in source.batches(run.micro, rows):
        yield {k: v.to(run.device) for k, v in batch.items()}
