"""The polar factor U Vᵀ of X = U Σ Vᵀ, or nearly: singular values are driven to 1 by matrix products alone.

    X ← X / max(s ‖X‖_F, 1e-7);   for each (a, b, c):   A = X Xᵀ,   X ← a X + (b A + c A²) X

which maps every singular value by σ ← a σ + b σ³ + c σ⁵ and keeps U and V. A tall X is transposed first, so that A has
the short side. Two sets of coefficients:

    newton-schulz    (3.4445, −4.7750, 2.0315) each time, s = 1. After 5 iterations σ is in [0.68, 1.14] if it was at
                     least 0.01 ‖X‖_F, and in [0.47, 1.21] from 0.001 ‖X‖_F.
    polar-express    each time the best polynomial for what the last one left, s = 1.02 or 1.01. After 5 iterations σ
                     is in [0.84, 1.15] from 0.001 ‖X‖_F, after 6 within 0.007 of 1, after 8 exact.

Iterates are bfloat16 on a GPU and float32 on a CPU, as few CPUs multiply bfloat16 and the result should not depend on
which; float64 stays float64. The norm is float32 at least. With short side a and long side b an iteration costs
4 a² b + 2 a³ operations.

Where b is well above a and the iterates are not bfloat16, three iterations at a time run on the Gram matrix R, and the
product Q of all that would have multiplied X from the left is applied once:

    R = X Xᵀ;   for each (a, b, c):   C = a I + b R + c R²,   Q ← C Q,   R ← C R C;   at the end X ← Q X

at 8 a³ an iteration and 4 a² b for the three. R holds σ², and rounding it costs the small σ; the error grows with every
iteration on the same R. After three it is still that of the first form, after five ten times that and more.

Sources: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024; "The Polar Express: Optimal Matrix
Sign Methods and Their Application to the Muon Algorithm", 2025.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .linalg import sum_dtype

Preset = Literal["newton-schulz", "polar-express"]

Polynomial = tuple[float, float, float]
"""(a, b, c) of σ ← a σ + b σ³ + c σ⁵."""

SMALLEST = 1e-7
"""Least norm to divide by: zero stays zero."""

JORDAN: Polynomial = (3.4445, -4.7750, 2.0315)

EXPRESS_FIVE: tuple[Polynomial, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Of the authors' released code, with its margin of 1.02 worked in."""

EXPRESS: tuple[Polynomial, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Of the paper, for σ from 0.001 to 1; the last is repeated."""

GRAM_FROM = 1.5
"""Long side by short side from which the Gram form takes fewer operations."""

GRAM_STEPS = 3
"""Iterations on one Gram matrix: the rounding errors of its small eigenvalues grow by up to a² each time."""


def coefficients(preset: Preset, steps: int) -> tuple[float, list[Polynomial]]:
    """s and the polynomials of `steps` iterations.

    Args:
        preset: which set.
        steps: how many, from 1.
    """
    if preset == "newton-schulz":
        return 1.0, [JORDAN] * steps
    if steps == len(EXPRESS_FIVE):
        return 1.02, list(EXPRESS_FIVE)
    margin = 1.01  # the paper's: for values that rounding takes beyond 1
    narrowed = [(a / margin, b / margin**3, c / margin**5) for a, b, c in EXPRESS[:-1]]
    return margin, [*narrowed[:steps], *[EXPRESS[-1]] * (steps - len(narrowed))]


@torch.no_grad()
def polar(X: Tensor, preset: Preset = "newton-schulz", steps: int = 5) -> Tensor:
    """Nearly U Vᵀ of X = U Σ Vᵀ, by the equations of this module's docstring.

    Args:
        X: [..., m, n], one matrix or many, each treated by itself.
        preset: which coefficients.
        steps: iterations, from 1.

    Returns:
        Of the shape and dtype of X; zero where a matrix is zero.

    Source:
        The module's docstring.
    """
    s, polynomials = coefficients(preset, steps)
    m, n = X.shape[-2:]
    size = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=sum_dtype(X))
    Y = (X / size.mul_(s).clamp_(min=SMALLEST)).to(working_dtype(X))
    Y = Y.flatten(end_dim=-3) if Y.ndim > 2 else Y.unsqueeze(0)
    Y = Y.mT if m > n else Y
    if max(m, n) >= GRAM_FROM * min(m, n) and Y.dtype != torch.bfloat16:
        for start in range(0, steps, GRAM_STEPS):
            Y = iterate_gram(Y, polynomials[start : start + GRAM_STEPS])
    else:
        Y = iterate(Y, polynomials)
    return (Y.mT if m > n else Y).reshape(X.shape).to(X.dtype)


def working_dtype(X: Tensor) -> torch.dtype:
    """What to iterate in."""
    if X.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if X.device.type == "cuda" else torch.float32


def iterate(X: Tensor, polynomials: list[Polynomial]) -> Tensor:
    """X ← a X + (b A + c A²) X with A = X Xᵀ, for each (a, b, c); overwrites X [K, m, n], m ≤ n."""
    A = X.new_empty(len(X), X.shape[1], X.shape[1])
    C, spare = torch.empty_like(A), torch.empty_like(X)
    for a, b, c in polynomials:
        torch.bmm(X, X.mT, out=A)
        torch.baddbmm(A, A, A, beta=b, alpha=c, out=C)
        torch.baddbmm(X, C, X, beta=a, out=spare)
        X, spare = spare, X
    return X


def iterate_gram(X: Tensor, polynomials: list[Polynomial]) -> Tensor:
    """The same by way of R = X Xᵀ: C = a I + b R + c R², Q ← C Q, R ← C R C; at the end Q X."""
    R = torch.bmm(X, X.mT)
    Q: Tensor | None = None
    C, spare = torch.empty_like(R), torch.empty_like(R)
    for i, (a, b, c) in enumerate(polynomials):
        torch.baddbmm(R, R, R, beta=b, alpha=c, out=C)
        C.diagonal(dim1=1, dim2=2).add_(a)
        if i + 1 < len(polynomials):
            torch.bmm(C, R, out=spare)
            torch.bmm(spare, C, out=R)
        if Q is None:
            Q, C = C, torch.empty_like(C)
        else:
            torch.bmm(C, Q, out=spare)
            Q, spare = spare, Q
    assert Q is not None
    return torch.bmm(Q, X)
