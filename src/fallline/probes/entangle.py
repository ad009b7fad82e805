"""Gradient entanglement: do chosen and rejected answers rise and fall together, because their gradients are alike?

With g_w = ∇ log π(y_w), g_l = ∇ log π(y_l) over all trained parameters, and a pair's own loss with the derivatives
d_w = −∂ℓ/∂log π(y_w) and d_l = +∂ℓ/∂log π(y_l), a small step θ ← θ − η ∇ℓ moves the two by

    Δ log π(y_w) / η = d_w ‖g_w‖² − d_l ⟨g_w, g_l⟩,   Δ log π(y_l) / η = d_w ⟨g_w, g_l⟩ − d_l ‖g_l‖²

to first order. A loss that sees only the margin is content with either sign of these as long as their difference is
positive: with d_w = d_l both fall where ‖g_w‖² < ⟨g_w, g_l⟩ < ‖g_l‖², both rise where it is the other way round, and
only below both squared norms does the chosen answer rise and the rejected one fall.

Of the step's pairs, before the step, with dropout off. What a pair does to other pairs, and what the optimizer makes of
the gradient, is left out. Pairs with an answer without a label are, too.

Cost, every `every` steps: the step's batch drawn and prepared once more, one forward and one backward of it by
`fallline.per_example`, in which each answer is an example; gradients of the head's weight are held an answer at a time,
as factors or products, for a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate import evaluating
from ..catalog import Card
from ..contracts import Change
from ..errors import InputError
from ..options import Options, option
from ..per_example import Beside, Norms, PerExample, grads_aside
from ..problem import Problem
from ..ranks import all_rows
from ..sequences import apart, sequence_counts, slopes
from ..step import Run, ask

CARD = Card(
    id="entangle",
    kind="probe",
    summary="Gradient entanglement of preferences: whether chosen and rejected answers move together, and which way.",
    paper="A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement",
    year=2025,
    repository="https://github.com/HumainLab/Understand_MarginPO",
    equation="Δ log π(y_w) ∝ d_w‖g_w‖² − d_l⟨g_w, g_l⟩; Δ log π(y_l) ∝ d_w⟨g_w, g_l⟩ − d_l‖g_l‖²",
    needs=(
        "an objective of the margin family",
        "trained parameters in layers that fallline.per_example knows",
    ),
    flops="a forward and a backward of the step's pairs, every `every` steps, and what per-example gradients add",
    claim="tells why both log-probabilities rise, or both fall, under DPO, and differences between the losses",
    checked=(
        "norms, products and moves against one float64 backward for each answer; log-probabilities after a tiny step "
        "move as told, to second order; equal answers have ratio 1 and do not move; a run with the probe is "
        "bit-identical to one without"
    ),
    departures=(
        "the authors' statistic divides by the chosen answer's squared norm in place of the smaller of the two, and "
        "differentiates sums over a batch; here each pair has its own, and d_w and d_l are those of the objective"
    ),
    tags=("preference", "alignment", "margin", "likelihood displacement", "gradient", "dpo", "metrics"),
)

PAIRED = "the objective does not compare a chosen and a rejected answer; take one of the margin family, such as dpo"


@dataclass(frozen=True)
class Config(Options):
    """When to look."""

    every: int = option(10, "steps between looks", gt=0)


@dataclass(frozen=True)
class Gram:
    """Squared norms and inner products of B pairs' gradients, [B] each.

    Attributes:
        ww, ll, wl: ‖g_w‖², ‖g_l‖², ⟨g_w, g_l⟩.
        d_w, d_l: see the module docstring.
    """

    ww: Tensor
    ll: Tensor
    wl: Tensor
    d_w: Tensor
    d_l: Tensor

    def moves(self, rounding: float = 0.0) -> tuple[Tensor, Tensor]:
        """Δ log π(y_w) / η and Δ log π(y_l) / η; 0 where that is a difference of numbers alike to `rounding`."""
        found = []
        for plus, minus in (
            (self.d_w * self.ww, self.d_l * self.wl),
            (self.d_w * self.wl, self.d_l * self.ll),
        ):
            move = plus - minus
            found.append(torch.where(move.abs() <= rounding * (plus.abs() + minus.abs()), 0, move))
        return found[0], found[1]

    def told(self, rounding: float) -> dict[str, float]:
        """What the log gets, see `Entangle.metrics`; nothing of no pairs."""
        if not len(self.ww):
            return {}
        up, down = self.moves(rounding)
        means = {
            "inner": self.wl,
            "chosen_norm": self.ww.sqrt(),
            "rejected_norm": self.ll.sqrt(),
            "chosen_move": up,
            "rejected_move": down,
            "ideal": (up > 0) & (down < 0),
            "both_fall": (up < 0) & (down < 0),
            "both_rise": (up > 0) & (down > 0),
        }
        found = {name: rows.double().mean().item() for name, rows in means.items()}
        some = torch.minimum(self.ww, self.ll) > 0
        if bool(some.any()):
            ww, ll, wl = self.ww[some], self.ll[some], self.wl[some]
            found["cosine"] = (wl / (ww.sqrt() * ll.sqrt())).mean().item()
            found["ratio"] = (wl / torch.minimum(ww, ll)).median().item()
        return found


class Entangle:
    """See the module docstring."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._found: dict[str, float] = {}

    def check(self, run: Run) -> None:
        """
        Raises:
            InputError: the objective compares no answers, or a trained layer is of an unknown kind.
        """
        if not hasattr(run.objective, "compares"):
            raise InputError(f"probe 'entangle': {PAIRED}")
        PerExample(run.model)

    def before_step(self, run: Run) -> Sequence[Change]:
        self._found = {}
        if run.step % self.every == 0:
            with evaluating(run.model):
                _, problem, _ = ask(run)
                rounding = max(torch.finfo(p.dtype).eps for p in problem.params.values()) ** 0.75
                self._found = {f"entangle_{name}": v for name, v in look(problem).told(rounding).items()}
        return ()

    def metrics(self) -> dict[str, float]:
        """When the step was looked at, means over its pairs, each name with ``entangle_`` before it: ``inner``
        ⟨g_w, g_l⟩, ``chosen_norm`` and ``rejected_norm``, ``cosine``, ``chosen_move`` and ``rejected_move`` (Δ log π /
        η); ``ratio``, the *median* of ⟨g_w, g_l⟩ / min(‖g_w‖², ‖g_l‖²), since a mean would be that of the pair with the
        smallest gradient; and the shares of pairs that are ``ideal`` (chosen rises, rejected falls), ``both_fall`` and
        ``both_rise``. Answers without any gradient have no cosine and no ratio."""
        return self._found


def look(problem: Problem) -> Gram:
    """Of a problem's pairs of all ranks. Nothing stays changed.

    Raises:
        InputError: the objective is another function of the model than of the answers' log-probabilities.
    """
    engine, found = PerExample(problem.run.model), [problem.zero().double().new_zeros(0, 5)]
    for i, batch in enumerate(problem.micro):
        norms, beside = Norms(), Beside()
        with grads_aside(problem.params.values()), engine.watch(apart(batch), norms, beside):
            table, logp = problem.answers(i)
            d = problem.total[""] * sum(slopes(table, logp).values(), torch.zeros_like(logp))
            if logp.requires_grad:
                logp.sum().backward()
        squared = norms.total().view(-1, 2)
        rows = torch.stack([squared[:, 0], squared[:, 1], beside.total, -d[:, 0], d[:, 1]], 1).double()
        found.append(rows[(sequence_counts(batch) > 0).all(1)])
    return Gram(*all_rows(torch.cat(found)).unbind(1))


def build(config: Config) -> Entangle:
    return Entangle(config.every)
