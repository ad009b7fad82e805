"""Rules that fix singular values."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import DECAYED, Row, adam


def muon(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    if role not in ("matrix", "adapter"):
        decay = o.weight_decay if role in DECAYED else 0
        return adam(W, G, s, t, lr * o.adam_lr_ratio, o.betas, o.eps, decay=decay)
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
