"""Rules that fix the size of rows and columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import Row, adam


def scale(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    if role in ("vector", "objective"):
        return adam(W, G, s, t, lr * o.vector_lr_ratio, o.betas, o.eps, corrected=False)
    if role == "head":
        G = s["B"] = o.momentum * s.get("B", 0) + (1 - o.momentum) * G
    X = G.reshape(len(G), -1)
    rms = np.sqrt(np.mean(X**2, axis=0 if role == "embedding" else 1, keepdims=True))
    U = (X / np.maximum(rms, 1e-8)).reshape(W.shape)
    return (1 - lr * o.weight_decay) * W - lr * U


ROWS = [
    Row(
        "scale",
        scale,
        {"lr": 1e-2, "weight_decay": 0.1},
        {
            "lr": 2e-2,
            "momentum": 0.8,
            "weight_decay": 0.2,
            "vector_lr_ratio": 0.5,
            "betas": (0.9, 0.99),
            "eps": 1e-3,
        },
        lr=3e-3,
    ),
]
