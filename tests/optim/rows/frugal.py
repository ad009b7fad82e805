"""Adam for a part of every matrix, the sign of the gradient for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fallline.noise import key, rng

from ..parameters import SHAPES
from . import DECAYED, Row, adam

SPLIT = ("matrix", "adapter")
NAMES = [name for name, (role, _) in SHAPES.items() if role in SPLIT]


def nearest(x: float) -> int:
    return int(np.floor(x + 0.5))


def adjacent(s: dict[str, Any], t: int, k: int, length: int) -> np.ndarray:
    return (key(0, t - 1, f"split/{s['name']}") + np.arange(k)) % length


def chosen(s: dict[str, Any], X: np.ndarray, t: int, o: Any) -> np.ndarray:
    """Which elements of X [m, n] Adam has, as flags."""
    flags = np.zeros(X.shape, dtype=bool)
    m, n = X.shape
    if o.split == "columns":
        flags[:, adjacent(s, t, nearest(o.density * n), n)] = True
    elif o.split == "rows":
        flags[adjacent(s, t, nearest(o.density * m), m)] = True
    elif o.split == "entries":
        drawn = torch.randperm(m * n, generator=rng(0, t - 1, f"split/{s['name']}")).numpy()
        flags.flat[drawn[: nearest(o.density * m * n)]] = True
    else:
        flags[:] = s["name"] in active(t, o)
    return flags


def active(t: int, o: Any) -> list[str]:
    """The matrices whose turn it is, of those of the common tests, whose names have one digit each."""
    k, turn = nearest(o.density * len(NAMES)), (t - 1) // o.refresh_every
    if o.block_order == "random":
        order = sorted(range(len(NAMES)), key=lambda place: key(0, turn * o.refresh_every, f"split/{place}"))
        return [sorted(NAMES)[place] for place in order[:k]]
    queue = sorted(NAMES) if o.block_order == "ascending" else sorted(NAMES)[::-1]
    return [queue[(turn * k + i) % len(queue)] for i in range(k)]


def direction(s: dict[str, Any], R: np.ndarray, o: Any) -> np.ndarray:
    b1, b2 = o.betas
    s["age"] += 1
    s["M"] = b1 * s["M"] + (1 - b1) * R
    s["V"] = b2 * s["V"] + (1 - b2) * R**2
    return s["M"] / (1 - b1 ** s["age"]) / (np.sqrt(s["V"] / (1 - b2 ** s["age"])) + o.eps)


def frugal(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    if role not in SPLIT:
        return adam(W, G, s, t, lr, o.betas, o.eps, decay=o.weight_decay if role in DECAYED else 0)
    X = G.reshape(len(G), -1)
    fresh = (t - 1) % o.refresh_every == 0
    if fresh:
        s["refreshes"] = s.get("refreshes", 0) + 1
        s["M"], s["V"], s["age"] = 0.0, 0.0, 0
    if o.split == "svd":
        wide = X.shape[0] < X.shape[1]
        X = X.T if wide else X
        if fresh:
            P = np.linalg.svd(X, full_matrices=False)[2][: nearest(o.density * X.shape[1])]
            s["P"] = np.where(np.abs(P) > 1e-12, P, 0)
        R = X @ s["P"].T
        E = X - R @ s["P"]
        E[np.abs(E) < 1e-13 * np.linalg.norm(X, axis=1, keepdims=True)] = 0
        U = direction(s, R, o) @ s["P"] + o.remainder_lr_ratio * (np.sign(E) if o.remainder == "sign" else E)
        U = U.T if wide else U
    else:
        if fresh:
            s["flags"] = chosen(s, X, t, o)
        rest = np.sign(X) if o.remainder == "sign" else X
        U = np.where(s["flags"], direction(s, np.where(s["flags"], X, 0), o), o.remainder_lr_ratio * rest)
    return W - lr * o.weight_decay * W - lr * U.reshape(G.shape)


OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "density": 0.4,
    "refresh_every": 5,
    "remainder_lr_ratio": 0.5,
    "weight_decay": 0.1,
}
CHANGES: dict[str, Any] = {
    "lr": 2e-2,
    "split": "rows",
    "density": 0.7,
    "refresh_every": 2,
    "remainder": "sgd",
    "remainder_lr_ratio": 0.25,
    "betas": (0.8, 0.95),
    "eps": 1e-3,
    "weight_decay": 0.2,
}
ROWS = [
    Row("frugal", frugal, OPTIONS, CHANGES, lr=1e-2),
    Row("frugal", frugal, OPTIONS | {"remainder": "sgd"}, CHANGES | {"remainder": "sign"}, lr=1e-2, name="frugal-sgd"),
    *(
        Row(
            "frugal",
            frugal,
            OPTIONS | {"split": split},
            CHANGES | {"split": "columns"},
            lr=1e-2,
            name=f"frugal-{split}",
        )
        for split in ("rows", "entries", "svd")
    ),
    Row(
        "frugal",
        frugal,
        OPTIONS | {"split": "block"},
        CHANGES | {"split": "columns", "block_order": "descending"},
        lr=1e-2,
        name="frugal-block",
        matrix_bytes=("0", "8 * n"),
    ),
]
