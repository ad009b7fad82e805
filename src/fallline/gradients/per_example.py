"""The plain gradient, and with it the gradient norm of every example.

    g_b = N ∇(example b's part of the step's loss),   .grad = Σ_b g_b / N,   example_grad_norm_b = ‖g_b‖₂

N is the number of examples, or the draw's size, so that at weight one g_b is the gradient of `example_loss`. Weights
are part of g_b. With several terms, `example_term_grad_norm` has the norms of each term's gradient, at one more
backward a term.

On its first step it compares one example with an ordinary backward of it alone (`fallline.per_example.check`), and
stops where they differ.

Cost: that of `backprop` and what `fallline.per_example` adds, nothing where nobody reads the norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..catalog import Card
from ..contracts import Signals
from ..options import Options
from ..per_example import Norms
from ..problem import Problem
from ..ranks import all_sum
from .backprop import Backprop
from .watched import Watched

CARD = Card(
    id="per-example",
    kind="estimator",
    summary="The exact gradient, and each example's gradient norm from the same backward pass.",
    paper="Efficient Per-Example Gradient Computations",
    year=2015,
    equation="‖g_b‖² = Σ_layers ‖G_bᵀ A_b‖², from a layer's inputs A_b and output gradients G_b",
    gives=("example_grad_norm", "example_term_grad_norm"),
    needs=("trained parameters in layers that fallline.per_example knows", "examples that do not see each other"),
    flops="a norm for each example and layer: 10 % of a 6.8 M Llama's own at 64 tokens, less than 1 % at 256; times "
    "are in docs/measurements.md",
    checked="norms against one backward for each example, 1e-10 in float64: padded, packed, tied, dropout, accumulated",
    tags=("gradient", "per-sample", "norm", "ghost"),
)

GIVES = frozenset(CARD.gives)


@dataclass(frozen=True)
class Config(Options):
    """No options."""


class PerExampleNorms:
    """See the module docstring."""

    gives: ClassVar[frozenset[str]] = GIVES
    repeatable: ClassVar[bool] = True

    def __init__(self) -> None:
        self._plain = Backprop()
        self._watched = Watched()

    def __call__(self, problem: Problem) -> Signals:
        """Add the gradient to `.grad`.

        Returns:
            ``loss`` [], the whole step's; ``example_grad_norm`` [b] and ``example_term_grad_norm`` [b, T], of this
            rank's examples, terms in the order of `Objective.count`, where somebody reads them.

        Raises:
            InputError: a trained layer is of an unknown kind, or examples see each other.
        """
        want = problem.want & GIVES
        if not want:
            return self._plain(problem)
        engine = self._watched.tried(problem)
        terms = [term for term in problem.total if term]
        total, whole, parts = problem.zero(), [problem.zero()[None][:0]], [problem.zero().new_zeros(0, len(terms))]
        for i, batch in enumerate(problem.micro):
            norms, single = Norms(), {term: Norms() for term in terms if "example_term_grad_norm" in want}
            with engine.watch(batch, norms) as seen:
                table = problem.table(i)
                with problem.run.clock("backward"):
                    rows = torch.stack(list(table.values())).sum(0)
                    if rows.requires_grad:
                        rows.sum().backward(retain_graph=bool(single))
                    for term, own in single.items():
                        seen.again(own)
                        if table[term].requires_grad:
                            table[term].sum().backward(retain_graph=True)
            total += rows.sum().detach()
            whole.append(norms.total())
            parts += [torch.stack([own.total() for own in single.values()], 1)] if single else []
        problem.reduce()
        scale = problem.total[""]
        found = {"example_grad_norm": torch.cat(whole), "example_term_grad_norm": torch.cat(parts)}
        return {"loss": all_sum(total)} | {name: scale * found[name].sqrt().to(scale) for name in want}


def build(config: Config) -> PerExampleNorms:
    return PerExampleNorms()
