"""Rules by which a layer's step depends on the other layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..parameters import SHAPES, gradient
from . import DECAYED, Row
from .orthogonal import POLAR_EXPRESS

KINDS = {
    "matrix": "matrix",
    "adapter": "matrix",
    "embedding": "table",
    "head": "table",
    "vector": "vector",
    "objective": "vector",
}


def express(X: np.ndarray) -> np.ndarray:
    X = X / max(1.02 * np.sqrt(np.sum(X**2)), 1e-7)
    for a, b, c in POLAR_EXPRESS:
        X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
    return X


def size(kind: str, D: np.ndarray) -> float:
    if kind == "table":
        return np.sum(np.abs(D))
    if kind == "vector":
        return np.sqrt(D.size * np.sum(D**2))
    X = D.reshape(len(D), -1)
    return np.sqrt(X.shape[0] / X.shape[1]) * np.sum(X * express(X))


def noise(name: str, s: dict[str, Any], t: int, o: Any) -> float:
    """H of a parameter after update t, of the gradients of the common tests."""
    role, shape = SHAPES[name]
    if t > 1:
        G, before = (gradient(step, name, shape).numpy() for step in (t - 1, t - 2))
        H = o.noise_momentum * s.get(f"H/{name}", 0) + (1 - o.noise_momentum) * size(KINDS[role], G - before) ** 2
        s[f"H/{name}"] = H
    return s.get(f"H/{name}", 0.0)


def lanton(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    assert o.ns_steps == 5
    kind = KINDS[role]
    B = s["B"] = o.momentum * s.get("B", 0) + (1 - o.momentum) * G
    if kind == "matrix":
        X = B.reshape(len(B), -1)
        U = 0.2 * max(X.shape) ** 0.5 * express(X).reshape(W.shape)
    else:
        U = 0.2 * (np.sign(B) if kind == "table" else np.sqrt(B.size) * B / np.sqrt(np.sum(B**2)))
    alike = [name for name, (other, _) in SHAPES.items() if KINDS[other] == kind]
    share = {name: o.alpha / np.sqrt(o.alpha**2 + noise(name, s, t, o)) for name in alike}
    lr = lr * np.sqrt(share[s["name"]] / max(share.values()))
    return (1 - lr * (o.weight_decay if role in DECAYED else 0)) * W - lr * U


ROWS = [
    Row(
        "lanton",
        lanton,
        {"lr": 1e-1, "alpha": 5.0, "noise_momentum": 0.9, "weight_decay": 0.1},
        {"lr": 5e-2, "alpha": 10.0, "noise_momentum": 0.5, "momentum": 0.8, "ns_steps": 4, "weight_decay": 0.2},
        lr=5e-2,
    ),
]
