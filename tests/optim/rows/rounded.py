"""AdamW with its moments in 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import DECAYED, Row


def book(signed: bool) -> np.ndarray:
    """The 256 numbers, ascending: decades of 1, 2, 4, … 64 cells, or twice as many and no sign."""
    positive = []
    for decade, cells in enumerate((1, 2, 4, 8, 16, 32, 64)):
        edges = np.linspace(0.1, 1, cells * (1 if signed else 2) + 1)
        positive += [*((edges[1:] + edges[:-1]) / 2 / 10 ** (6 - decade))]
    negative = [-x for x in positive] if signed else []
    return np.float64(np.float32(sorted([*negative, 0, *positive, 1])))


BOOKS = {signed: book(signed) for signed in (True, False)}


def rounded(X: np.ndarray, signed: bool, block: int) -> np.ndarray:
    """X of each row's blocks by the element of largest magnitude, to the nearest number by brute force, and back.

    Without sign, zero is the nearest of nothing else.
    """
    out = np.empty_like(X)
    for X_row, row in zip(X.reshape(len(X), -1), out.reshape(len(X), -1), strict=True):
        for at in range(0, len(row), block):
            x = X_row[at : at + block]
            scale = x[np.argmax(np.abs(x))]
            if scale == 0:
                row[at : at + block] = 0
                continue
            y = np.float64(np.float32(x / scale))
            numbers = BOOKS[signed] if signed else BOOKS[signed][1:]
            nearest = numbers[np.argmin(np.abs(y[:, None] - numbers), axis=1)]
            row[at : at + block] = np.where(y == 0, 0, nearest) * scale
    return out


def adamw_8bit(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    b1, b2 = o.betas
    M = b1 * s.get("M", np.zeros_like(W)) + (1 - b1) * G
    V = b2 * s.get("V", np.zeros_like(W)) + (1 - b2) * G**2
    step = (M / (1 - b1**t)) / (np.sqrt(V / (1 - b2**t)) + o.eps)
    if role not in ("embedding", "vector", "objective") and W.size >= o.min_8bit_size:
        M, V = rounded(M, True, o.block_size), rounded(V, False, o.block_size)
    s["M"], s["V"] = M, V
    return W - lr * (o.weight_decay if role in DECAYED else 0) * W - lr * step


ROWS = [
    Row(
        "adamw-8bit",
        adamw_8bit,
        # with these β no number comes nearer than 1e-6 to the border of two codes, where float32 may take the other
        {"lr": 1e-2, "betas": (0.95, 0.999), "weight_decay": 0.1, "block_size": 4, "min_8bit_size": 20},
        {
            "lr": 2e-2,
            "betas": (0.8, 0.95),
            "eps": 1e-3,
            "weight_decay": 0.2,
            "block_size": 2,
            "min_8bit_size": 25,
        },
        lr=1e-2,
    ),
]
