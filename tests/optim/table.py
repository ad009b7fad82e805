"""One row buys an optimizer the tests of test_common.py: its options and its equation in float64.

A reference is written from the paper's equations, in NumPy, and shares no code with the package:

    reference(role, W, G, state, t, lr, options) → W after update t = 1, 2, …

where `state` is a dict of its own for each parameter, empty before the first update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
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
    """

    id: str
    reference: Reference
    options: dict[str, Any]
    changes: dict[str, Any]
    lr: float
    name: str = field(default="")

    def __str__(self) -> str:
        return self.name or self.id


def adamw(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    b1, b2 = o.betas
    s["M"] = b1 * s.get("M", 0) + (1 - b1) * G
    s["V"] = b2 * s.get("V", 0) + (1 - b2) * G**2
    W = W - lr * (o.weight_decay if role in DECAYED else 0) * W
    return W - lr * (s["M"] / (1 - b1**t)) / (np.sqrt(s["V"] / (1 - b2**t)) + o.eps)


def sgd(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    G = G + (o.weight_decay if role in DECAYED else 0) * W
    B = s["B"] = G if t == 1 else o.momentum * s["B"] + G
    return W - lr * (G + o.momentum * B if o.nesterov else B)


def scale(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    if role in ("vector", "objective"):
        b1, b2 = o.betas
        lr = lr * o.vector_lr_ratio
        s["M"] = b1 * s.get("M", 0) + (1 - b1) * G
        s["V"] = b2 * s.get("V", 0) + (1 - b2) * G**2
        return W - lr * sqrt(1 - b2**t) / (1 - b1**t) * s["M"] / (np.sqrt(s["V"]) + o.eps)
    if role == "head":
        G = s["B"] = o.momentum * s.get("B", 0) + (1 - o.momentum) * G
    X = G.reshape(len(G), -1)
    rms = np.sqrt(np.mean(X**2, axis=0 if role == "embedding" else 1, keepdims=True))
    U = (X / np.maximum(rms, 1e-8)).reshape(W.shape)
    return (1 - lr * o.weight_decay) * W - lr * U


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


def muon(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    if role not in ("matrix", "adapter"):
        b1, b2 = o.betas
        lr = lr * o.adam_lr_ratio
        s["M"] = b1 * s.get("M", 0) + (1 - b1) * G
        s["V"] = b2 * s.get("V", 0) + (1 - b2) * G**2
        W = W - lr * (o.weight_decay if role in DECAYED else 0) * W
        return W - lr * (s["M"] / (1 - b1**t)) / (np.sqrt(s["V"] / (1 - b2**t)) + o.eps)
    B = s["B"] = o.momentum * s.get("B", 0) + (1 - o.momentum) * G
    X = (o.momentum * B + (1 - o.momentum) * G if o.nesterov else B).reshape(len(G), -1)
    m, n = X.shape
    if o.orthogonalise == "newton-schulz":
        s_, coefficients = 1.0, [(3.4445, -4.7750, 2.0315)] * o.ns_steps
    else:
        assert o.ns_steps == 5
        s_, coefficients = 1.02, POLAR_EXPRESS
    X = X / max(s_ * np.sqrt(np.sum(X**2)), 1e-7)
    for a, b, c in coefficients:
        X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
    size = max(1, m / n) ** 0.5 if o.scale == "original" else 0.2 * max(m, n) ** 0.5
    return (1 - lr * o.weight_decay) * W - lr * size * X.reshape(W.shape)


POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


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
    Row(
        "muon",
        muon,
        {"lr": 2e-2, "weight_decay": 0.1, "adam_lr_ratio": 1.0},
        {
            "lr": 1e-2,
            "momentum": 0.8,
            "nesterov": False,
            "orthogonalise": "polar-express",
            "ns_steps": 4,
            "scale": "match-rms",
            "weight_decay": 0.2,
            "adam_lr_ratio": 0.5,
            "betas": (0.9, 0.99),
            "eps": 1e-3,
        },
        lr=1e-1,
    ),
    Row(
        "muon",
        muon,
        {"lr": 2e-2, "nesterov": False, "orthogonalise": "polar-express", "scale": "match-rms", "adam_lr_ratio": 1.0},
        {
            "lr": 1e-2,
            "momentum": 0.8,
            "nesterov": True,
            "orthogonalise": "newton-schulz",
            "ns_steps": 8,
            "scale": "original",
            "weight_decay": 0.2,
            "adam_lr_ratio": 0.1,
            "betas": (0.9, 0.99),
            "eps": 1e-3,
        },
        lr=1e-1,
        name="muon-express",
    ),
]
