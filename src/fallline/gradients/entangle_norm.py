"""Pairwise-normalised gradients: a margin loss moves chosen and rejected answers with equal force, so neither drags
the other along.

Let g_w and g_l be the gradients of a pair's two log-probabilities over all trained parameters, D_w and D_l the
derivatives of the loss's comparing terms by them, of opposite sign, and A_w, A_l those of all other terms:

    .grad = Σ_pairs  c (sgn(D_w) g_w / ‖g_w‖ + sgn(D_l) g_l / ‖g_l‖) + A_w g_w + A_l g_l,   c = √|D_w D_l|

For DPO and whatever else sees only the difference, c = |D_w| = |D_l|; a pair's step is c (g_w/‖g_w‖ − g_l/‖g_l‖). Its
product with g_w is c (‖g_w‖ − ⟨g_w, g_l⟩/‖g_l‖), at least 0 by Cauchy and Schwarz, and with g_l at most 0: to first
order, and as far as this pair goes, the chosen answer never falls and the rejected one never rises. Likelihood terms
(`cpo`, `orpo`, `slic`, `rrhf`) are left as they are; they may lift a rejected answer that is like the chosen one.

A pair's step has norm 2c at most, whatever its gradients: learning rates of plain descent do not carry over. An
optimizer that scales coordinates by themselves, such as AdamW, bends the direction, and the guarantee with it. An
answer that the model is sure of has a gradient of next to nothing, which counts as much as any other.

Cost: one forward and one backward by `fallline.per_example`, in which each answer is an example, so that every pair has
its own norms; factors or products of a micro-batch's gradients are kept for their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..catalog import Card
from ..contracts import Signals
from ..errors import InputError
from ..options import Options
from ..per_example import Norms
from ..problem import Problem
from ..ranks import all_sum
from ..sequences import apart, slopes
from .watched import Watched

if TYPE_CHECKING:
    from ..step import Run

CARD = Card(
    id="entangle-norm",
    kind="estimator",
    summary="Pairwise-normalised gradients of margin losses: to first order, chosen answers do not fall.",
    paper="A Common Pitfall of Margin-based Language Model Alignment: Gradient Entanglement",
    year=2025,
    repository="https://github.com/HumainLab/Understand_MarginPO",
    equation="c (g_w/‖g_w‖ − g_l/‖g_l‖) for each pair, c = −∂loss/∂log π(y_w)",
    needs=(
        "an objective that compares a chosen and a rejected answer: dpo, ipo, rdpo, dpop, simpo, cpo, orpo, slic, rrhf",
        "trained parameters in layers that fallline.per_example knows",
    ),
    flops="a norm for each answer and layer; sums are formed once more, with their weights",
    claim="raises the chosen and lowers the rejected log-probability",
    checked=(
        "effect not shown; the gradient against one float64 backward for each answer, cut, packed and with an adapter; "
        "no pair's chosen answer falls nor its rejected one rises, to first order, for seven losses; that of dpo where "
        "norms are equal, to a factor. On a 1 M Llama, rates tuned, five seeds: the change of chosen answers when the "
        "margin has grown by 10 nats, minus dpo's, +0.2 [−3.7, 4.1] nats under plain descent; +3.0 [−2.0, 8.1] under "
        "AdamW, where three of five did not get there in 60 steps (python benchmarks/entanglement.py)"
    ),
    evidence=("benchmarks/results/entanglement.json",),
    departures=(
        "the authors' code has neither of the paper's remedies, so this is a reading of it: norms are of each pair, "
        "over all trained parameters; where the two coefficients differ, as by length, both answers get their "
        "geometric mean, without which the guarantee would not hold"
    ),
    tags=("preference", "alignment", "margin", "likelihood displacement", "normalised gradient", "per-example"),
)

_WHAT = "estimator 'entangle-norm'"


@dataclass(frozen=True)
class Config(Options):
    """No options."""


def weights(norm: Tensor, compared: Tensor, other: Tensor) -> Tensor:
    """What multiplies each answer's gradient, [B, 2]; a gradient of 0 is left alone.

    Args:
        norm: [B, 2], ‖g_w‖ and ‖g_l‖. compared: [B, 2], D. other: [B, 2], A.
    """
    c = compared.abs().prod(1, keepdim=True).sqrt()
    return compared.sign() * torch.where(norm > 0, c / norm, 0) + other


class EntangleNorm:
    """See the module docstring."""

    gives: ClassVar[frozenset[str]] = frozenset()
    repeatable: ClassVar[bool] = True

    def __init__(self) -> None:
        self._watched = Watched()

    def check(self, run: Run) -> None:
        """
        Raises:
            InputError: the objective has no term that compares two answers, or trains something of its own; a trained
                layer is of an unknown kind.
        """
        objective = run.objective
        if not getattr(objective, "compares", ()):
            alone = hasattr(objective, "compares")
            found = "asks something of each answer by itself" if alone else "is no function of two log-probabilities"
            raise InputError(
                f"{_WHAT} evens out the two sides of a margin, and this objective {found}; take dpo, or another that "
                "compares the chosen answer with the rejected one"
            )
        own = [name for name in run.trainable() if name.startswith("objective.")]
        if own:
            raise InputError(f"{_WHAT} knows gradients of answers only, and the objective trains {own[0]!r} as well")
        self._watched.engine(run)

    def __call__(self, problem: Problem) -> Signals:
        """Add the gradient to `.grad`.

        Returns:
            ``loss`` [], the whole step's.

        Raises:
            InputError: a term is no function of the answers' log-probabilities.
        """
        run, total = problem.run, problem.zero()
        compares: frozenset[str] = run.objective.compares  # type: ignore[attr-defined]
        engine = self._watched.tried(problem, apart, lambda i: problem.answers(i)[1].flatten())
        for i, batch in enumerate(problem.micro):
            norms = Norms()
            with engine.watch(apart(batch), norms, keep=True) as seen:
                table, logp = problem.answers(i)
                slope, none = slopes(table, logp), torch.zeros_like(logp)
                if logp.requires_grad:
                    with run.clock("backward"):
                        logp.sum().backward()
            compared = sum((s for term, s in slope.items() if term in compares), none)
            other = sum((s for term, s in slope.items() if term not in compares), none)
            with run.clock("backward"):
                seen.add(weights(norms.total().view(-1, 2).sqrt().to(logp), compared, other).flatten())
            total += torch.stack([value.detach().sum() for value in table.values()]).sum()
        problem.reduce()
        return {"loss": all_sum(total)}


def build(config: Config) -> EntangleNorm:
    return EntangleNorm()
