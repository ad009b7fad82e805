"""Keep the examples that a short run found hard, and train on those alone.

    kept = the round(k N) highest of the scores s₁ … s_N, after the round(o N) highest of all were dropped

where N counts the examples that have a score.

The scores come from `fallline score`: the error norm EL2N = ‖softmax(z) − e_y‖₂, averaged over the labels of the
example, or GraNd, the norm of the gradient of its loss, both averaged over several short runs. Where labels are noisy,
most of the very highest scores are wrong labels, and the offset o leaves them out; without it, they are what is kept.

Examples are chosen one by one, whatever row they lie in, and those that are kept are put into rows anew, by best fit;
the score of a row would be an average over chance neighbours. The rows then come once an epoch, in an order drawn anew
for each, as with `uniform`. Examples without a label have no score and are never kept, unless `keep` is 1, which keeps
all examples whatever their scores.

An epoch has fewer rows than before: with the same number of steps there are more epochs.

Cost: once, reading all examples to know that the scores are theirs, sorting, and one step of plain Python for each
kept example; then that of `uniform`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..catalog import Card
from ..contracts import Draw, Source
from ..errors import InputError
from ..noise import rng
from ..options import Options, option
from .packed import PackedSource, pack_whole, whole_rows
from .scores import read_scores
from .uniform import Epochs, check_rows, number_of_rows

CARD = Card(
    id="data-diet",
    kind="sampler",
    summary="Trains on the examples that short runs found hardest, by EL2N or GraNd.",
    paper="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
    year=2021,
    repository="mansheej/data_diet",
    equation="EL2N = ‖softmax(z) − e_y‖, GraNd = ‖∇ℓ‖; the k N highest means over runs, after the o N highest of all",
    needs=("scores of the same data: fallline score RUN … --by el2n --out FILE",),
    flops="scoring: a forward of all examples for each run, for GraNd and a backward; and the short runs themselves",
    claim="half of CIFAR-10 can be left out with slightly better test accuracy (ResNet-18, EL2N of ten runs)",
    checked="scikit-learn's digits, an MLP, five seeds, equal steps, the rate tuned without pruning; test accuracy "
    "with 95 % intervals. All: 97.2 ± 0.8 %. Of the hardest 50, 30 and 10 % by EL2N: 97.3 ± 0.6, 97.3 ± 0.7, 80 ± 5 "
    "%; of a random choice: 96.1 ± 1.0, 94.5 ± 1.1, 88.4 ± 1.6 %; of the easiest: 91 ± 2, 81 ± 6, 71 ± 5 %. GraNd "
    "ranks as EL2N does (rank correlation 0.999). Better than random at 30 %; at 50 % only GraNd's interval is clear "
    "of 0; at 70 % no difference is shown; at 10 % the mean is worse, its interval holds 0. The ten scoring models "
    "took as many steps as one training. With 10 % of the labels flipped, all: 94.6 ± 1.1 %; of 50 and 30 %, random: "
    "90 ± 3, 85 ± 3 %; the easiest: 92 ± 2, 86 ± 4 %; the hardest by EL2N: 85 ± 1, 51 ± 5 %; and after an offset "
    "of 0.1, the true share: 96.7 ± 0.7, 96.7 ± 0.6 %, as 96 % of the hardest tenth are flipped (python "
    "benchmarks/data_diet.py). On language models: effect not shown",
    evidence=("benchmarks/results/data_diet.json",),
    departures="the paper scores images; here an example's EL2N is the mean over its labels, and its GraNd the "
    "gradient norm of its mean loss, over what the run trained, which tends to rank short examples high. The paper "
    "also scores at initialisation; here a run has a step at least",
    tags=("pruning", "data selection", "coreset", "el2n", "grand", "difficulty", "subset", "noisy labels"),
)


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Which examples to keep."""

    scores: str = option(help="the file that `fallline score` wrote of a run of the same data")
    keep: float = option(0.5, "share of the examples that is kept", gt=0, le=1, source="paper: half of CIFAR-10")
    order: Literal["hardest", "easiest", "random"] = option(
        "hardest",
        "keep the highest scores, the lowest, or any; the last two are what to compare with",
        source="paper",
    )
    offset: float = option(
        0.0,
        "share of the examples, those with the very highest scores, that is dropped first: for wrong labels",
        ge=0,
        lt=1,
        source="chosen here: clean labels",
        used_if=("'order' is hardest", lambda c: c.order == "hardest"),
    )

    def check(self) -> None:
        if self.keep + self.offset > 1:
            raise InputError(f"'keep' and 'offset' are shares of the whole: {self.keep:g} + {self.offset:g} is over 1")


def chosen(scores: Tensor, config: Config, seed: int) -> Tensor:
    """The ids of the examples that are kept, ascending.

    Args:
        scores: [N], by example id; what is not finite is left out.
        config: how many, and which. seed: of the run, for a random choice.

    Returns:
        [K] int64, at least one. Of equal scores lower ids are kept first.
    """
    ids = scores.isfinite().nonzero().squeeze(1)
    if config.order == "random":
        ids = ids[torch.randperm(len(ids), generator=rng(seed, 0, "sampler/kept"))]
    else:
        ids = ids[scores[ids].sort(stable=True, descending=config.order == "hardest").indices]
    first = min(round(config.offset * len(ids)), len(ids) - 1)
    return ids[first : first + max(1, round(config.keep * len(ids)))].sort().values


@dataclass
class DataDiet:
    """See the module docstring; a `Sampler`.

    Attributes:
        ids: [K] int64, the kept examples, in the order of their rows.
        rows: [rows + 1] int64: row r holds ids[rows[r]] … ids[rows[r + 1] − 1]; None: each is a row.
        epochs: which rows each step takes.
    """

    ids: Tensor
    rows: Tensor | None
    epochs: Epochs

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        draw = whole_rows(self.rows, self.epochs(step))
        return draw._replace(ids=self.ids[draw.ids])

    def state_dict(self) -> dict[str, Any]:
        """Only what was kept, so that a resume can tell that the scores are others now."""
        return {"kept": hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state != self.state_dict():
            raise InputError("sampler 'data-diet': the scores are not those that the run began with; bring them back")


def build(config: Config, source: Source, rows: int, seed: int) -> DataDiet:
    """A sampler that gives `rows` rows of kept examples a step.

    Raises:
        InputError: no rows a step; a file of scores that cannot be used, is of other data, or has no score.
    """
    check_rows(rows)
    try:
        scores = read_scores(config.scores, source)
    except InputError as error:
        raise InputError(f"sampler 'data-diet': {error}") from None
    if not scores.isfinite().any():
        raise InputError(f"sampler 'data-diet': {config.scores} has no score, no example has a label")
    if config.keep == 1:
        return DataDiet(torch.arange(len(source)), source.rows, Epochs(number_of_rows(source), rows, seed))
    ids = chosen(scores, config, seed)
    if not isinstance(source, PackedSource):
        return DataDiet(ids, None, Epochs(len(ids), rows, seed))
    ids, ends = refilled(source, ids)
    return DataDiet(ids, ends, Epochs(len(ends) - 1, rows, seed))


def refilled(source: PackedSource, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Examples put into rows anew, by best fit.

    Args:
        ids: [K] int64.

    Returns:
        `DataDiet.ids` and `DataDiet.rows`.
    """
    at, none = ids.numpy(), np.zeros(0, np.bool_)
    packed = pack_whole(source.tokens, none, at, source.size[at], np.arange(len(at)), source.length, source.pad)
    return torch.from_numpy(packed.start), packed.rows  # `start` went in as ids, and is only put in order
