"""The baselines."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import DECAYED, Row, adam


def adamw(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    return adam(W, G, s, t, lr, o.betas, o.eps, decay=o.weight_decay if role in DECAYED else 0)


def sgd(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    G = G + (o.weight_decay if role in DECAYED else 0) * W
    B = s["B"] = G if t == 1 else o.momentum * s["B"] + G
    return W - lr * (G + o.momentum * B if o.nesterov else B)


def lion(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    b1, b2 = o.betas
    M = s.get("M", 0)
    s["M"] = b2 * M + (1 - b2) * G
    decayed = W - lr * (o.weight_decay if role in DECAYED else 0) * W
    return decayed - lr * np.sign(b1 * M + (1 - b1) * G)


def adafactor(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    beta = 1 - t**o.beta2_decay

    def mean(key: str, axis: int) -> np.ndarray:
        s[key] = beta * s.get(key, 0) + (1 - beta) * np.mean(G**2, axis=axis, keepdims=True)
        return s[key]

    if G.ndim > 1:
        R, C = mean("R", -1), mean("C", -2)
        V = R * C / np.maximum(R.mean(-2, keepdims=True), o.eps[0])
    else:
        V = s["V"] = beta * s.get("V", 0) + (1 - beta) * G**2
    U = G / np.sqrt(np.maximum(V, o.eps[0] ** 2))
    U = U / max(1, np.sqrt(np.mean(U**2)) / o.clip_threshold)
    size = max(o.eps[1], np.sqrt(np.mean(W**2)))
    decayed = W - lr * (o.weight_decay if role in DECAYED else 0) * W
    return decayed - size * min(lr, t**-0.5) * U


ROWS = [
    Row(
        "adamw",
        adamw,
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 2e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2},
        lr=1e-2,
    ),
    Row("sgd", sgd, {"lr": 0.05}, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}, lr=0.3),
    Row(
        "sgd",
        sgd,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.5, "nesterov": False, "weight_decay": 0.2},
        lr=0.1,
        name="sgd-nesterov",
    ),
    Row(
        "lion",
        lion,
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 2e-2, "betas": (0.8, 0.95), "weight_decay": 0.2},
        lr=3e-3,
    ),
    Row(
        "adafactor",
        adafactor,
        {"lr": 0.2, "weight_decay": 0.1},
        {
            "lr": 0.1,
            "beta2_decay": -0.5,
            "eps": (1e-2, 1e-3),
            "clip_threshold": 1.5,
            "weight_decay": 0.2,
        },
        lr=0.1,
        factors_last_two=True,
    ),
]
