"""Rules that keep nothing for hidden matrices: the gradient's rows, columns and singular values are set anew."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import DECAYED, Row, adam


def rest(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    return adam(W, G, s, t, lr, o.betas, o.eps, decay=o.weight_decay if role in DECAYED else 0)


def rows(X: np.ndarray, least: float = 1e-8) -> np.ndarray:
    return np.sqrt(X.shape[1]) * X / np.maximum(np.sqrt(np.sum(X**2, axis=1, keepdims=True)), least)


def unit(X: np.ndarray) -> np.ndarray:
    """Rows at unit root mean square."""
    return rows(X, 1e-8 * np.sqrt(X.shape[1]))


EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875 * 1.01, -1.25 * 1.01**3, 0.375 * 1.01**5),  # the last has no margin
]


def whitened(X: np.ndarray) -> np.ndarray:
    """U Vᵀ where singular values are at least a thousandth of the norm: the eight polynomials of Polar Express."""
    X = X / max(1.01 * np.sqrt(np.sum(X**2)), 1e-7)
    for a, b, c in EXPRESS:
        X = a / 1.01 * X + b / 1.01**3 * X @ X.T @ X + c / 1.01**5 * X @ X.T @ X @ X.T @ X
    return X


def sinkgd(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    if role not in ("matrix", "adapter"):
        return rest(role, W, G, s, t, lr, o)
    X = G.reshape(len(G), -1)
    for _ in range(o.iterations):
        X = rows(rows(X).T).T
    return (1 - lr * o.weight_decay) * W - lr * o.matrix_lr_ratio * X.reshape(W.shape)


def swan(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    if role not in ("matrix", "adapter"):
        return rest(role, W, G, s, t, lr, o)
    assert o.ns_steps == 8
    X = G.reshape(len(G), -1)
    along = 0 if X.shape[0] > X.shape[1] else 1
    X = X - X.mean(axis=along, keepdims=True)
    std = np.sqrt(np.mean(X**2, axis=along, keepdims=True))
    X = np.divide(X, std, out=np.zeros_like(X), where=std > 1e-15)
    D = whitened(X)
    if X.any():
        D = D * np.sqrt(np.sum(X**2) / np.sum(D**2))
    return (1 - lr * o.weight_decay) * W - lr * o.matrix_lr_ratio * D.reshape(W.shape)


def mngd(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    if role not in ("matrix", "adapter"):
        return rest(role, W, G, s, t, lr, o)
    project = {"row": unit, "column": lambda X: unit(X.T).T, "spectral": lambda X: max(X.shape) ** 0.5 * whitened(X)}
    X = G.reshape(len(G), -1)
    for _ in range(o.iterations):
        for norm in o.norms:
            X = project[norm](X)
    return (1 - lr * o.weight_decay) * W - lr * o.matrix_lr_ratio * X.reshape(W.shape)


OPTIONS = {"lr": 1e-2, "matrix_lr_ratio": 0.5, "weight_decay": 0.1}

CHANGES = {"lr": 2e-2, "matrix_lr_ratio": 0.2, "weight_decay": 0.2, "betas": (0.8, 0.99), "eps": 1e-3}

ROWS = [
    Row("sinkgd", sinkgd, OPTIONS, CHANGES | {"iterations": 2}, lr=5e-2),
    Row("sinkgd", sinkgd, OPTIONS | {"iterations": 1}, CHANGES | {"iterations": 5}, lr=5e-2, name="sinkgd-once"),
    Row("swan", swan, OPTIONS, CHANGES | {"ns_steps": 5}, lr=5e-2),
    Row(
        "mngd",
        mngd,
        OPTIONS | {"iterations": 2},
        CHANGES | {"norms": ("spectral", "column"), "iterations": 1},
        lr=5e-2,
    ),
    Row(
        "mngd",
        mngd,
        OPTIONS | {"norms": ("column", "spectral", "row")},
        CHANGES | {"norms": ("row", "max"), "iterations": 2},
        lr=5e-2,
        name="mngd-three",
    ),
]
