"""Intruder dimensions: strong directions of the trained weight that the weight it began as did not have.

    W₀ = U S Vᵀ,   W₁ = U' S' V'ᵀ   [m, n],  k = min(m, n),  σ falling
    c_j = max_i |u'_jᵀ u_i|,   j = 1 … K'          u'_j is an intruder  ⇔  c_j < ε

LoRA puts such directions beside the old ones, full fine-tuning turns the old ones; the more there are, the more of
what the model could do before is said to be lost. Where several σ of W₀ are nearly equal, any rotation of their vectors
would do as well, and c_j depends on which one the decomposition took; with `width` > 0, singular values within that
relative width are one cluster and |u'_jᵀ u_i| is the length of u'_j's projection on the cluster's span. A direction
that W₀ has at σ = 0 to rounding is never clustered: it is none of W₀'s own.

Costs two thin singular value decompositions of every changed layer, one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..catalog import Card
from ..errors import InputError, NonFiniteError
from ..options import Options, option
from .inspection import Chart, Findings, Subject, Table

CARD = Card(
    id="intruder",
    kind="inspection",
    summary="Counts leading singular vectors of the trained weights that resemble none of the base model's.",
    paper="LoRA vs Full Fine-tuning: An Illusion of Equivalence",
    year=2024,
    repository="reeceshuttle/intruder-dimensions",
    equation="c_j = max_i |u'_jᵀ u_i| over the left singular vectors of W₀; u'_j, j ≤ K', is an intruder where c_j < ε",
    needs=("a run, an adapter, or a model with --base",),
    flops="two thin singular value decompositions of every changed layer",
    checked="none where nothing changed; one planted rank-1 change is found as exactly one, at its place, 80 weights "
    "with Gaussian and decaying spectra; the same after multiplying both weights by an orthogonal matrix from the "
    "right; the count of PEFT's reduce_intruder_dimension layer by layer. A tiny Llama on the same data: a LoRA of "
    "rank 1 at a high rate has intruders, full fine-tuning at a thirtieth of it none; not compared at tuned rates",
    departures="decomposes in float32 whatever the weights' dtype; the authors' script reads the base as float16. "
    "Clusters of nearly equal singular values (`width`) are ours; weights are W₀ + ΔW, not rounded as merging would; "
    "the repair, which only PEFT's LoRA has, is not here",
    tags=("adapter", "LoRA", "audit", "forgetting", "singular values", "spectrum", "low rank"),
)

GRID = tuple(k / 10 for k in range(1, 10))
"""ε at which intruders are counted."""

SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""K' that get a column and a curve, where they are below `top`."""


@dataclass(frozen=True)
class Config(Options):
    """How many directions are looked at, and what makes one an intruder."""

    top: int = option(10, "K', the leading directions of each weight that are looked at", gt=0, source="authors' code")
    epsilon: float = option(
        0.5, "ε, a direction is an intruder when its best match is below", gt=0, lt=1, source="authors' code"
    )
    width: float = option(
        0.0,
        "singular values of W₀ this close, relatively, are one cluster; 0: none are",
        ge=0,
        lt=1,
        source="authors' code",
    )


def matches(W0: Tensor, W1: Tensor, top: int, width: float = 0.0) -> Tensor:
    """c_j, the best match of each of W₁'s leading left singular vectors among W₀'s.

    Args:
        W0, W1: [m, n] in float32 or float64.
        top: K'. width: see the module docstring.

    Returns:
        [min(K', m, n)], between 0 and 1.
    """
    U0, S0, _ = torch.linalg.svd(W0, full_matrices=False)
    U1 = torch.linalg.svd(W1, full_matrices=False)[0][:, :top]
    cosines = U1.t() @ U0
    if width:
        cluster = clusters(S0, width, max(W0.shape) * torch.finfo(S0.dtype).eps)
        lengths = cosines.new_zeros(len(cosines), int(cluster[-1]) + 1)
        cosines = lengths.index_add_(1, cluster, cosines.square()).sqrt()
    return cosines.abs().amax(1).clamp(max=1.0)


def clusters(S: Tensor, width: float, tiny: float) -> Tensor:
    """[k] int64, rising from 0: which cluster each of these falling singular values is in. None spans more than `width`
    of its largest; what is below `tiny` of the very largest stands alone."""
    found, first, number = [], S[0].item(), 0
    for i, value in enumerate(S.tolist()):
        if i and (first - value > width * first or value <= tiny * S[0].item()):
            number, first = number + 1, value
        found.append(number)
    return torch.tensor(found, device=S.device)


class Intruder:
    """See the module docstring."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @torch.no_grad()
    def look(self, subject: Subject) -> Findings:
        c = self.config
        found: dict[str, list[float]] = {}
        shapes: dict[str, list[int]] = {}
        for path, W0, W1 in subject.changed():
            if not (W0.isfinite().all() and W1.isfinite().all()):
                raise NonFiniteError(f"the weight of {path} is not finite; nothing was written")
            found[path] = matches(W0, W1, c.top, c.width).tolist()
            shapes[path] = list(W0.shape)
        if not found:
            raise InputError(f"{subject.name} has no linear layer whose weight differs from its base's")
        most = max(map(len, found.values()))
        tops = [*(k for k in SHOWN if k < most), most]
        count = {e: [intruders(found, e, k) for k in tops] for e in GRID}
        layers = {path: [j + 1 for j, v in enumerate(values) if v < c.epsilon] for path, values in found.items()}
        total, having = sum(map(len, layers.values())), sum(map(bool, layers.values()))
        return Findings(
            question=f"{subject.name}: which directions are new?",
            remarks=[
                f"{total} of the {sum(map(len, found.values()))} leading directions (top {most} of each of "
                f"{len(found)} changed weights) match none of the base's by {c.epsilon:g} or more; they are in "
                f"{having} weights."
            ],
            tables=[
                Table(
                    "Intruders over ε and K'",
                    ["ε", *(f"top {k}" for k in tops)],
                    [[f"{e:g}", *map(str, row)] for e, row in count.items()],
                    "How many of each changed weight's leading left singular vectors have no |cosine| of at least ε "
                    "with any of the base weight's, added up.",
                ),
                Table(
                    "By weight",
                    ["layer", "m × n", f"intruders at {c.epsilon:g}", "at places", "least match"],
                    [
                        [path, " × ".join(map(str, shapes[path])), str(len(at)), ", ".join(map(str, at)), f"{low:.3f}"]
                        for (path, at), low in zip(layers.items(), map(min, found.values()), strict=True)
                    ],
                    "Place 1 is the direction with the largest singular value of the trained weight.",
                ),
            ],
            charts=[
                Chart(
                    "Intruders",
                    "ε",
                    "directions",
                    {f"top {k}": (list(GRID), [float(row[i]) for row in count.values()]) for i, k in enumerate(tops)},
                )
            ],
            found={
                "intruders": total,
                "top": tops,
                "counts": {f"{e:g}": row for e, row in count.items()},
                "layers": {
                    path: {"shape": shapes[path], "matches": values, "intruders": layers[path]}
                    for path, values in found.items()
                },
            },
        )


def intruders(found: dict[str, list[float]], epsilon: float, top: int) -> int:
    """How many of the first `top` matches of each weight are below ε."""
    return sum(value < epsilon for values in found.values() for value in values[:top])


def build(config: Config) -> Intruder:
    return Intruder(config)
