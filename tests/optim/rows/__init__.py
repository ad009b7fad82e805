"""One row buys an optimizer the tests of test_common.py: its options and its equation in float64. A file a family.

A reference is written from the paper's equations, in NumPy, and shares no code with the package:

    reference(role, W, G, state, t, lr, options) → W after update t = 1, 2, …

where `state` is a dict of its own for each parameter, with nothing but its `name` before the first update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Reference = Callable[[str, np.ndarray, np.ndarray, dict[str, Any], int, float, Any], np.ndarray]

DECAYED = ("matrix", "embedding", "head", "adapter")


@dataclass(frozen=True)
class Row:
    """What the common tests need to know.

    Attributes:
        id: of the method.
        reference: its equation.
        options: a setting in which all of its terms take part.
        changes: option → another value, which must change the trajectory; every option of the method is there.
        lr: at which a tiny Llama learns.
        factors_last_two: whether its state of more than two dimensions is by the last two, where formulas on cards know
            such a tensor as (first, all others).
        matrix_bytes: formulas one of which is a matrix's bytes of state, where the card's is an average over matrices.
    """

    id: str
    reference: Reference
    options: dict[str, Any]
    changes: dict[str, Any]
    lr: float
    name: str = field(default="")
    factors_last_two: bool = False
    matrix_bytes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name or self.id


def adam(
    W: np.ndarray,
    G: np.ndarray,
    s: dict[str, Any],
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    *,
    decay: float = 0.0,
    corrected: bool = True,
) -> np.ndarray:
    """Adam with decoupled decay; ε beside the corrected root, or not."""
    b1, b2 = betas
    s["M"] = b1 * s.get("M", 0) + (1 - b1) * G
    s["V"] = b2 * s.get("V", 0) + (1 - b2) * G**2
    root = np.sqrt(1 - b2**t)
    N = s["M"] / (np.sqrt(s["V"]) + (eps * root if corrected else eps))
    return W - lr * decay * W - lr * root / (1 - b1**t) * N
