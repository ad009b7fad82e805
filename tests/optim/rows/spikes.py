"""Variants of Adam that look at single elements: their change, their spikes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fallline.noise import rng

from . import DECAYED, Row


def diffgrad(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    b1, b2 = o.betas
    s["M"] = b1 * s.get("M", 0) + (1 - b1) * G
    s["V"] = b2 * s.get("V", 0) + (1 - b2) * G**2
    root = np.sqrt(1 - b2**t)
    change = np.abs(s.get("G", 0) - G)
    if o.change == "relative":
        change = change * root / (np.sqrt(s["V"]) + o.eps)
    s["G"] = G
    friction = 1 / (1 + np.exp(-change))
    decayed = W - lr * (o.weight_decay if role in DECAYED else 0) * W
    return decayed - lr * root / (1 - b1**t) * friction * s["M"] / (np.sqrt(s["V"]) + o.eps)


def spam(role: str, W: np.ndarray, G: np.ndarray, s: dict[str, Any], t: int, lr: float, o: Any) -> np.ndarray:
    b1, b2 = o.betas
    every = o.reset_every or 10**9
    if t % every == 0:
        s["M"], s["V"], s["k"] = 0 * G, 0 * G, 0
        if o.reset_step:
            s["t"] = 0
    if role == "matrix" and o.density < 1 and (t == 1 or t % every == 0):
        drawn = torch.randperm(G.size, generator=rng(0, t - 1, f"entries/{s['name']}"))
        s["on"] = np.isin(np.arange(G.size), drawn[: int(o.density * G.size)].numpy()).reshape(G.shape)
    share = 1.0
    if t >= every and s["k"] < o.rewarm:
        share = 1 - 0.99 * (1 + np.cos(np.pi * s["k"] / (o.rewarm + 1))) / 2
    s["k"], s["t"] = s.get("k", 0) + 1, s.get("t", 0) + 1
    V = s.get("V", 0 * G)
    s["clipped"] = np.zeros(G.shape, bool)
    if o.threshold and t % every >= o.clip_after:
        limit = np.where(V > 0, np.sqrt(o.threshold * V), np.inf)
        s["clipped"] = (np.abs(G) > limit) & s.get("on", True)
        G = np.where(np.abs(G) > limit, np.sign(G) * limit, G)
    s["M"] = b1 * s.get("M", 0) + (1 - b1) * G
    s["V"] = b2 * V + (1 - b2) * G**2
    step = np.sqrt(1 - b2 ** s["t"]) / (1 - b1 ** s["t"]) * s["M"] / (np.sqrt(s["V"]) + o.eps)
    decayed = W - lr * (o.weight_decay if role in DECAYED else 0) * W
    return decayed - lr * share * np.where(s.get("on", True), step, 0)


SPAM = {"lr": 1e-2, "threshold": 0.5, "clip_after": 2, "reset_every": 5, "rewarm": 3, "weight_decay": 0.1}
SPAM_CHANGES = {
    "lr": 2e-2,
    "threshold": 0.1,
    "clip_after": 1,
    "reset_every": 4,
    "reset_step": True,
    "rewarm": 6,
    "betas": (0.8, 0.95),
    "eps": 1e-2,
    "weight_decay": 0.2,
}

ROWS = [
    Row(
        "diffgrad",
        diffgrad,
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 2e-2, "betas": (0.8, 0.95), "eps": 1e-3, "change": "relative", "weight_decay": 0.2},
        lr=2e-2,
    ),
    Row(
        "diffgrad",
        diffgrad,
        {"lr": 1e-2, "change": "relative", "weight_decay": 0.1},
        {"lr": 2e-2, "betas": (0.8, 0.95), "eps": 1e-3, "change": "absolute", "weight_decay": 0.2},
        lr=2e-2,
        name="diffgrad-relative",
    ),
    Row("spam", spam, SPAM, SPAM_CHANGES | {"density": 0.5}, lr=1e-2),
    Row(
        "spam",
        spam,
        SPAM | {"density": 0.4, "reset_every": 4},
        SPAM_CHANGES | {"density": 0.5, "reset_every": 5},
        lr=1e-2,
        name="spam-sparse",
    ),
]
