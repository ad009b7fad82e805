"""Per-example gradients in the one backward pass that training does.

    engine, norms = PerExample(model), Norms()
    with engine.watch(batch, norms):
        loss(model, batch).backward()      # .grad is what it always is
    norms.total()                          # [B] squared norms of each example's gradient

Norms, inner products, sketches (`readers`); weighted and clipped sums (`keep` and `add`, or `weigh`). An example is a
row of the batch or, in packed rows, a segment. All is exact: nothing is approximated but by rounding and, in a sketch,
by design. What is known about a layer is in `layers.py`; what is not known is refused by name, and a trained parameter
that is used past its layer is noticed in the backward. `check` compares with an ordinary backward of one example.

Source: the norm product of Goodfellow (2015), ghost clipping (Li et al., 2021) and book-keeping (Bu et al., 2022); here
each parameter's gradients take, of their two forms, the one that costs less.
"""

from .check import check
from .engine import PerExample, grads_aside
from .head import HeadGradients, Piece, pieces
from .layers import known
from .layout import Spans
from .readers import Along, Beside, Dots, Norms, Reader, Sketch
from .watch import Use, Watch, linear, vectors, watching

__all__ = [
    "Along",
    "Beside",
    "Dots",
    "HeadGradients",
    "Norms",
    "PerExample",
    "Piece",
    "Reader",
    "Sketch",
    "Spans",
    "Use",
    "Watch",
    "check",
    "grads_aside",
    "known",
    "linear",
    "pieces",
    "vectors",
    "watching",
]
