"""What each word of the training step promises the others. The text with the reasons is docs/contracts.md.

Sampler, objective, estimator, optimizer, schedule and parts may also have `check(run)`: called once when the run is put
together, before its state is loaded, to refuse what they cannot work with.

> **data** gives a batch → the **objective** scores it on the **model** → the **gradient** estimator turns scores into
> gradients → the **optimizer** turns gradients into an update → the **schedule** says how large.

Shapes: B examples, R rows of L tokens (R = B unless rows are packed), T terms of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .problem import Problem
    from .step import Run

Batch = dict[str, Tensor]
"""Columns by name. Example columns have leading dimension B, in the order of the draw: always `example_id` and
`weight`. A packed batch also has `segment` [R, L], which example (0 … B−1) each token belongs to, −1 for padding; its
token columns have shape [R, L, …], and examples lie in row order. Other columns with a meaning: `side` [R, L] (which of
the sequences 0, 1, … of its example a token belongs to, −1 for padding), `domain` (stream), `group_id` (examples that
may not be parted; a group lies together), `position_ids` (restarts at 0 where a document, or a sequence of an example,
begins). In a packed batch an example column may not begin with the shape of `segment`."""

FORGET, RETAIN = 0, 1
"""The streams of unlearning, in the column `domain`."""

STREAMS = {FORGET: "forget", RETAIN: "retain"}
"""Their names."""

Signals = dict[str, Tensor]
"""What a step learned, by the names of the table in docs/contracts.md, on the device, read lazily.

Rows ([B], named ``example_…``) are in the order of `example_id`: the examples of all ranks, rank by rank. With closures
they are those of the step's first evaluation. The step makes:

- `loss` [], `term_loss` [T] in the order of `Objective.count`;
- `example_loss` [B]: Σ_term value_b · N / N_term, N_term what the term is divided by and N the same for examples; at
  weight one their mean is the loss;
- `grad_norm` [], `layer_grad_norm` [L] in the order of `Problem.params`: before clipping, summed over ranks;
- `lr` []: of the first parameter group, as the update used it; `tokens` []: positions run, padding included; these two
  on the CPU;
- `example_id` [B]."""

Couples = Literal["none", "group", "batch"]

STEP_GIVES = frozenset(
    {"loss", "term_loss", "example_loss", "grad_norm", "layer_grad_norm", "lr", "tokens", "example_id"}
)
"""Signals that the step itself makes, whatever the estimator. `term_loss`, `example_loss` and `layer_grad_norm` only
when somebody reads them."""


class Draw(NamedTuple):
    """The examples of one whole step, the same on every rank.

    Attributes:
        ids: [B] int64, which examples.
        weight: [B] float32, multiplies each example's loss; never enters the denominator.
        row: [B] int64 from 0, not decreasing: the packed row each example lies in. None: one row each.
        size: fixes the denominator of every term, such as the expected size of a Poisson draw. None: what was counted.
        group: [B] int64 from 0, not decreasing: examples that may not be parted, neither by ranks nor by micro-batches;
            the batch gets it as `group_id`. A packed row lies in one group. None: no groups, or the source knows.
    """

    ids: Tensor
    weight: Tensor
    row: Tensor | None = None
    size: float | None = None
    group: Tensor | None = None

    def part(self, rank: int, world: int) -> Draw:
        """The groups, or rows where there are none, `rank`, `rank + world`, … of this draw."""
        if world == 1:
            return self
        row = torch.arange(len(self.ids)) if self.row is None else self.row
        keep = (row if self.group is None else self.group) % world == rank
        kept = None if self.row is None else row[keep].unique_consecutive(return_inverse=True)[1]
        group = None if self.group is None else self.group[keep]
        return Draw(self.ids[keep], self.weight[keep], kept, self.size, group)


@dataclass
class Loss:
    """An objective's answer: a table of terms × examples.

    Attributes:
        value: term → [B], the *sum* over what `count` counted, coefficient included.
        metrics: scalars to log, of this micro-batch. The step sums them over micro-batches and ranks, so an average
            is written with ``share/TERM``. They have names that no signal has.
    """

    value: dict[str, Tensor]
    metrics: Signals = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """One trainable parameter that came, went or changed: `(p, None)` freezes or removes, `(None, p)` adds or thaws,
    `(p, q)` replaces.

    Attributes:
        name: the parameter's name in the model.
        old: before. new: after.
        index: for a replacement, int64 of `new`'s shape: the flat element of `old` that each element continues, −1
            where it is new. None: equal leading corners correspond.
        policy: what happens to the state of a parameter that goes: ``drop`` it or ``keep`` it for its return.
    """

    name: str
    old: nn.Parameter | None
    new: nn.Parameter | None
    index: Tensor | None = None
    policy: Literal["drop", "keep"] = "drop"


class Source(Protocol):
    """Examples by id. `len(source)` examples; `rows` [rows + 1] says that packed row r holds the examples
    rows[r] … rows[r + 1] − 1, and is None where each example is a row of its own. May also have `unit`, what one
    example is, such as ``line``, where no two examples are of the same one; empty where they may be; and `streams`,
    which rows are of which stream (`name`, `first`, `stop`) and the `share` of a step's rows that each shall have."""

    @property
    def rows(self) -> Tensor | None: ...

    def __len__(self) -> int: ...

    def __call__(self, draw: Draw, rng: torch.Generator) -> Batch:
        """The drawn examples' columns. Noise comes from `rng` and the example id alone. An empty draw gives empty
        columns."""


class Sampler(Protocol):
    """Which examples. May also have `prepare(run, batch) → batch`, `reads` with `observe(run, signals)`, and state;
    `rate`, the probability with which every example is drawn, independently of all others, at every step; and
    `by_stream = True`: every step has the share of each stream that the source states."""

    def draw(self, step: int, rng: torch.Generator) -> Draw: ...


class Objective(Protocol):
    """Scores a batch on the model: an `nn.Module` whose parameters are trained and whose buffers are state.

    May also have `prepare(run, batch) → batch`, `reads` and `observe(run, signals)`; `reference = True`, which asks for
    `run.reference`, the model as the run began; `hold(reference)`, where `forward` itself asks the reference, for
    whoever sizes a forward (`check` does it in a run); `columns`, name → shape beyond [B] of the float64 columns that
    `prepare` adds and `forward` needs, and `token_columns(model)`, name → (shape beyond [R, L], dtype), for whoever
    sizes a forward without preparing; `compares`, of a function of what `sequence_logps` says of two sequences, the
    terms that weigh one against the other; `parts`, name → `Part`, which take part in the run; and `trade_off`, two
    measures of an evaluation that a comparison draws against each other. In `forward` the batch carries ``share/TERM``
    [B], the derivative of the loss by each value, for kernels that form gradients in the forward. Rows outside a term's
    stream have value and count 0. With `couples = "group"` every batch has `group_id`.
    """

    couples: ClassVar[Couples]

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """term → [B]: how many tokens (or other things) each example's value sums over; from the batch alone."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss: ...


class Estimator(Protocol):
    """Turns this step's problem into gradients: sets `.grad`, summed over ranks (`problem.reduce()`), and returns
    signals, always `loss`, the whole step's loss summed over ranks. Sums begin at `problem.zero()`, so that a rank
    without examples takes part in every exchange. Of ``example_…`` signals it returns this rank's rows, which the
    step gathers; every other signal is already that of all ranks. It may have `secret`, from which dropout is then
    drawn in place of the run's seed, and `record()`, what the run's record shall say of it."""

    gives: ClassVar[frozenset[str]]
    repeatable: ClassVar[bool]  # may a closure ask again? False for private estimators

    def __call__(self, problem: Problem) -> Signals: ...


class Schedule(Protocol):
    """A `torch.optim.lr_scheduler.LRScheduler`. A closed-loop one has `reads` and takes the signals in `step`."""

    def step(self, *signals: Any) -> None: ...


class Part(Protocol):
    """Anything else that takes part in a step: an adapter, a layer switch, a probe. Every method is optional.

    A part that changes which parameters train, or their shapes, returns the changes; only the step hands them to the
    optimizer. `setup` does so once, before step 0, and `restructure` before a state is loaded.
    """

    reads: ClassVar[frozenset[str]]

    def setup(self, run: Run) -> Sequence[Change] | None: ...
    def before_step(self, run: Run) -> Sequence[Change]: ...
    def after_step(self, run: Run, signals: Signals) -> Sequence[Change]: ...
    def restructure(self, run: Run, state: Mapping[str, Any]) -> Sequence[Change]: ...
    def metrics(self) -> Mapping[str, Any]: ...  # of the last step, for the log
