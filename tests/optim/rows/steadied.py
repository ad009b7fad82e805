"""Adam on gradients that are clipped, scaled and forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import DECAYED, Row


def stable_spam(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    top = np.abs(G).max()
    s["m"] = o.gamma3 * s.get("m", 0) + (1 - o.gamma3) * top
    limit = s["m"] / (1 - o.gamma3**t)
    if top > limit:
        G = np.where(np.abs(G) > limit, G / top * limit, G)
    size = np.sqrt(np.sum(G**2))
    s["a"] = o.gamma1 * s.get("a", 0) + (1 - o.gamma1) * size
    s["b"] = o.gamma2 * s.get("b", 0) + (1 - o.gamma2) * size**2
    if size > 0:
        G = G / size * (s["a"] / (1 - o.gamma1**t)) / (np.sqrt(s["b"] / (1 - o.gamma2**t)) + o.eps)
    if o.reset_every and t % o.reset_every == 0:
        s["M"], s["V"], s["age"] = 0, 0, 0
    s["age"] = s.get("age", 0) + 1
    b1, b2 = o.betas
    s["M"] = b1 * s.get("M", 0) + (1 - b1) * G
    s["V"] = b2 * s.get("V", 0) + (1 - b2) * G**2
    step = (s["M"] / (1 - b1 ** s["age"])) / (np.sqrt(s["V"] / (1 - b2 ** s["age"])) + o.eps)
    return W - lr * (o.weight_decay if role in DECAYED else 0) * W - lr * step


ROWS = [
    Row(
        "stable-spam",
        stable_spam,
        {"lr": 1e-2, "gamma3": 0.9, "reset_every": 7, "weight_decay": 0.1},
        {
            "lr": 2e-2,
            "gamma1": 0.5,
            "gamma2": 0.8,
            "gamma3": 0.5,
            "reset_every": 3,
            "betas": (0.8, 0.95),
            "eps": 1e-3,
            "weight_decay": 0.2,
        },
        lr=1e-2,
    ),
]
