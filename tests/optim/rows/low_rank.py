"""Rules that remember gradients in a subspace."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import numpy as np
import torch

from fallline.noise import rng

from . import DECAYED, Row, adam


def drawn(s: dict[str, Any], t: int, r: int, a: int) -> np.ndarray:
    """The random numbers: those of the first run seed, this update and this name."""
    return torch.randn(r, a, generator=rng(0, t - 1, f"subspace/{s['name']}")).double().numpy() / np.sqrt(r)


def found(s: dict[str, Any], X: np.ndarray, t: int, rank: int, o: Any, how: str) -> np.ndarray:
    """P of this update, for X with its long side first."""
    every, offset = o.refresh_every, crc32(s["name"].encode()) if o.spread else 0
    if "P" in s and (t - 1) % every != offset % every:
        return s["P"]
    s["finds"] = s.get("finds", 0) + 1
    r, a = min(rank, X.shape[1]), X.shape[1]
    if how == "gaussian":
        s["P"] = drawn(s, t, r, a)
    elif how == "svd":
        V = np.linalg.svd(X, full_matrices=False)[2][:r]
        s["P"] = np.stack([v if v[np.argmax(np.abs(v))] > 0 else -v for v in V])
    else:
        A = X.T @ X / np.sum(X**2) + 1e-5 * np.eye(a)
        steps, P = (1, s["P"]) if "P" in s else (4, drawn(s, t, r, a))
        for _ in range(steps):
            Q, T = np.linalg.qr(A @ P.T)
            P = (Q * np.where(np.diag(T) < 0, -1, 1)).T
        s["P"] = P
    return s["P"]


def direction(s: dict[str, Any], R: np.ndarray, o: Any) -> np.ndarray:
    b1, b2 = o.betas
    s["M"] = b1 * s.get("M", 0) + (1 - b1) * R
    s["V"] = b2 * s.get("V", 0) + (1 - b2) * R**2
    return s["M"] / (np.sqrt(s["V"]) + o.eps)


def limited(s: dict[str, Any], S: np.ndarray, o: Any, least: float = 0.0) -> np.ndarray:
    size, before = max(np.linalg.norm(S), least), s.get("size", 0.0)
    factor = max(size / (before + 1e-8), o.growth) / o.growth if before > 0 else 1.0
    s["limits"] = s.get("limits", 0) + (factor > 1)
    s["size"] = size / factor
    return S / factor


def stepped(
    role: str,
    W: np.ndarray,
    G: np.ndarray,
    s: dict[str, Any],
    t: int,
    lr: float,
    o: Any,
    rank: int,
    how: str,
    rule: Any,
) -> np.ndarray:
    """What is the same in all: Adam for what is no matrix, the long side first, bias correction and decay."""
    if role not in ("matrix", "adapter"):
        return adam(W, G, s, t, lr, o.betas, o.eps, decay=o.weight_decay if role in DECAYED else 0, corrected=False)
    X = G.reshape(len(G), -1)
    wide = X.shape[0] < X.shape[1]
    X = X.T if wide else X
    P = found(s, X, t, rank, o, how)
    R = X @ P.T
    U = rule(s, X, P, R, direction(s, R, o))
    U = (U.T if wide else U).reshape(G.shape)
    return (1 - lr * o.weight_decay) * W - lr * np.sqrt(1 - o.betas[1] ** t) / (1 - o.betas[0] ** t) * U


def galore(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    return stepped(role, W, G, s, t, lr, o, o.rank, o.basis, lambda s, X, P, R, N: o.alpha * N @ P)


def fira(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    kappa = o.alpha if o.residual_alpha else 1

    def rule(s: dict[str, Any], X: np.ndarray, P: np.ndarray, R: np.ndarray, N: np.ndarray) -> np.ndarray:
        ratio = np.linalg.norm(N, axis=1) / (np.linalg.norm(R, axis=1) + 1e-8)
        S, all_ = ratio[:, None] * (X - kappa * R @ P), ratio[:, None] * X
        return o.alpha * N @ P + limited(s, S, o, least=1e-7 * np.linalg.norm(all_))

    return stepped(role, W, G, s, t, lr, o, o.rank, o.basis, rule)


def apollo(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    def rule(s: dict[str, Any], X: np.ndarray, P: np.ndarray, R: np.ndarray, N: np.ndarray) -> np.ndarray:
        ratio = np.linalg.norm(N, axis=1) / (np.linalg.norm(R, axis=1) + 1e-8)
        return np.sqrt(o.scale) * limited(s, ratio[:, None] * X, o)

    return stepped(role, W, G, s, t, lr, o, o.rank, "gaussian", rule)


def apollo_mini(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    def rule(s: dict[str, Any], X: np.ndarray, P: np.ndarray, R: np.ndarray, N: np.ndarray) -> np.ndarray:
        return np.sqrt(o.scale) * limited(s, np.linalg.norm(N) / (np.linalg.norm(R) + 1e-8) * X, o)

    return stepped(role, W, G, s, t, lr, o, 1, "gaussian", rule)


COMMON: dict[str, Any] = {"lr": 1e-2, "refresh_every": 5, "weight_decay": 0.1}
CHANGES: dict[str, Any] = {
    "lr": 2e-2,
    "refresh_every": 2,
    "spread": False,
    "betas": (0.8, 0.95),
    "eps": 1e-3,
    "weight_decay": 0.2,
}
INSIDE: dict[str, Any] = CHANGES | {"rank": 1, "alpha": 0.5}
BESIDE: dict[str, Any] = INSIDE | {"growth": 1.5, "residual_alpha": False}

ROWS = [
    Row("galore", galore, COMMON | {"rank": 1}, INSIDE | {"rank": 2, "basis": "svd"}, lr=1e-2),
    Row(
        "galore",
        galore,
        COMMON | {"rank": 2, "basis": "svd", "spread": False},
        INSIDE | {"basis": "iteration", "spread": True},
        lr=1e-2,
        name="galore-svd",
    ),
    Row("fira", fira, COMMON | {"rank": 1}, BESIDE | {"rank": 2, "basis": "svd"}, lr=1e-2),
    Row(
        "fira",
        fira,
        COMMON | {"rank": 2, "basis": "svd", "spread": False, "residual_alpha": False},
        BESIDE | {"basis": "iteration", "spread": True, "residual_alpha": True},
        lr=1e-2,
        name="fira-svd",
    ),
    Row("apollo", apollo, COMMON | {"rank": 2}, CHANGES | {"rank": 1, "scale": 2.0, "growth": 1.5}, lr=1e-2),
    Row(
        "apollo",
        apollo,
        COMMON | {"rank": 2, "spread": False, "scale": 4.0},
        CHANGES | {"rank": 1, "spread": True, "scale": 2.0, "growth": 1.5},
        lr=1e-2,
        name="apollo-together",
    ),
    Row("apollo-mini", apollo_mini, COMMON, CHANGES | {"scale": 64.0, "growth": 1.5}, lr=1e-2),
]
