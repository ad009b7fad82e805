"""Is it true, for this model and this batch?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import InputError
from .engine import PerExample, grads_aside
from .readers import Norms

TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative, of an example's norm in low precision; 1e-3 otherwise."""


def check(engine: PerExample, batch: Mapping[str, Tensor] | int, rows: Callable[[], Tensor], at: int = 0) -> None:
    """Compare one example's gradient norms with an ordinary backward of it alone: two forwards, one backward each.

    It finds what no rule of layers can: examples that see each other, an axis that is not what it seems.

    Args:
        engine: the engine. batch: as for `PerExample.watch`.
        rows: gives each example's loss [B], the same at every call. at: which example to try.

    Raises:
        InputError: they differ; the parameter that differs most is named. `.grad` is as it was.
    """
    if not engine.params:
        return
    norms = Norms()
    with grads_aside(engine.params.values()):
        with engine.watch(batch, norms, keep=True):
            losses = rows()
            if not losses.requires_grad:
                return
            losses.sum().backward()
        own = torch.autograd.grad(rows()[at], list(engine.params.values()), allow_unused=True)
    true = {n: g.double().square().sum().item() for n, g in zip(engine.params, own, strict=True) if g is not None}
    found = {name: squared[at].item() for name, squared in norms.squared.items()}
    if not all(math.isfinite(v) for v in true.values()):
        return  # whoever trains on it has the better words for that
    whole = max(sum(true.values()), sum(found.values())) ** 0.5
    wrong = {n: abs(found.get(n, 0.0) ** 0.5 - true.get(n, 0.0) ** 0.5) for n in engine.params}
    worst = max(wrong, key=lambda n: wrong[n], default=None)
    kinds = {p.dtype for p in engine.params.values()}
    allowed = max(TOLERANCE.get(kind, 1e-3) for kind in kinds) if kinds else 0
    if worst is not None and not wrong[worst] <= allowed * whole:
        raise InputError(
            f"per-example gradients are not those of one example: the norm of {worst!r} is "
            f"{found.get(worst, 0.0) ** 0.5:g}, an ordinary backward of example {at} gives "
            f"{true.get(worst, 0.0) ** 0.5:g}; do examples see each other, as in a batch normalisation?"
        )
