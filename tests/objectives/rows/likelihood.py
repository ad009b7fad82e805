"""Functions of the logits of one token, or of the probability of all of an example's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fallline.contracts import Batch

from . import Reference, Row


def by_token(term: str, loss: Callable[[Tensor, int, Any], Tensor]) -> Reference:
    """Σ_t w_t ℓ(z_t, y_t), one token after the other."""

    def reference(logits: Tensor, batch: Batch, o: Any) -> dict[str, Tensor]:
        found = []
        for z, labels, weight in zip(logits, batch["labels"].tolist(), batch["token_weight"], strict=True):
            each = [w * loss(row, y, o) for row, y, w in zip(z, labels, weight, strict=True) if y >= 0]
            found.append(sum(each, z.new_zeros(())))
        return {term: torch.stack(found)}

    return reference


def probability(z: Tensor, y: int) -> Tensor:
    return z[y].exp() / z.exp().sum()


def causal(z: Tensor, y: int, o: Any) -> Tensor:
    return -probability(z, y).log()


def comp_sum(z: Tensor, y: int, o: Any) -> Tensor:
    """Φ^τ(u) with u = Σ_{k ≠ y} exp(z_k − z_y)."""
    u = torch.stack([(z[k] - z[y]).exp() for k in range(len(z)) if k != y]).sum()
    return (1 + u).log() if o.tau == 1 else ((1 + u) ** (1 - o.tau) - 1) / (1 - o.tau)


def margins(z: Tensor, y: int, c: float) -> Tensor:
    return torch.stack([z[k] - z[y] + (c if k != y else 0) for k in range(len(z))])


def ldr_kl(z: Tensor, y: int, o: Any) -> Tensor:
    d = margins(z, y, o.margin)
    return o.temperature * (d / o.temperature).exp().mean().log()


def ldr_k(z: Tensor, y: int, o: Any) -> Tensor:
    return margins(z, y, o.margin).sort(descending=True).values[: o.k].sum() / o.k


def aldr_kl(z: Tensor, y: int, o: Any) -> Tensor:
    """The maximum over λ, by bisection of the derivative; its own derivative by the implicit function theorem."""
    d, K = margins(z, y, o.margin), len(z)

    def objective(x: Tensor) -> Tensor:
        penalty = o.alpha * math.log(K) / (2 * o.temperature) * (x - o.temperature) ** 2
        return x * (d / x).exp().mean().log() - penalty

    low, high = o.temperature * (1 - 1 / o.alpha), o.temperature
    for _ in range(40):
        x = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(objective(x), x, retain_graph=True)
        low, high = (x.item(), high) if slope > 0 else (low, x.item())
    (slope,) = torch.autograd.grad(objective(x), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope, x, retain_graph=True)
    return objective(x.detach() - slope / bend.detach())  # slope is 0, but not its derivative by z


def covered(p: Tensor, samples: int) -> Tensor:
    """−log(1 − (1 − p)^N); as it stands it loses the digits of a small p."""
    return -(-torch.expm1(samples * torch.log1p(-p))).log()


def dco(logits: Tensor, batch: Batch, o: Any) -> dict[str, Tensor]:
    found = []
    for z, labels, weight in zip(logits, batch["labels"].tolist(), batch["token_weight"], strict=True):
        each = [probability(row, y) ** w for row, y, w in zip(z, labels, weight, strict=True) if y >= 0]
        loss = covered(torch.stack(each).prod(), o.samples) if each else z.new_zeros(())
        found.append(loss / max(1, len(each)) if o.length_norm else loss)
    return {"dco": torch.stack(found)}


def dco_step(logits: Tensor, batch: Batch, o: Any) -> dict[str, Tensor]:
    found = []
    for z, labels, weight in zip(logits, batch["labels"].tolist(), batch["token_weight"], strict=True):
        total, p = z.new_zeros(()), None
        for row, y, w in zip(z, labels, weight, strict=True):
            if y >= 0:
                p = probability(row, y) ** w * (1 if p is None else p)
            if y in o.separators and p is not None:
                total, p = total + covered(p, o.samples), None
        found.append(total if p is None else total + covered(p, o.samples))
    return {"dco-step": torch.stack(found)}


OPTIONS = {"margin": 0.3, "temperature": 0.7}
ROWS = [
    Row("causal", by_token("nll", causal)),
    Row("comp-sum", by_token("comp-sum", comp_sum), {"tau": 1.7}, {"tau": 1.2}),
    Row("comp-sum", by_token("comp-sum", comp_sum), {"tau": 0.5}, {"tau": 0.0}, name="comp-sum-hard"),
    Row("ldr-kl", by_token("ldr-kl", ldr_kl), OPTIONS, {"margin": 0.0, "temperature": 2.0}),
    Row("ldr-k", by_token("ldr-k", ldr_k), {"k": 4, "margin": 0.3}, {"k": 2, "margin": 1.0}),
    Row(
        "aldr-kl",
        by_token("aldr-kl", aldr_kl),
        OPTIONS | {"alpha": 1.5, "iterations": 12},
        {"margin": 0.0, "temperature": 2.0, "alpha": 4.0, "iterations": 1},
    ),
    Row("dco", dco, {"samples": 300}, {"samples": 40, "length_norm": True}, products=4),
    Row("dco", dco, {"samples": 300, "length_norm": True}, {}, products=4, name="dco-by-length"),
    Row(
        "dco-step",
        dco_step,
        {"samples": 8, "separators": (18, 20, 9, 2, 17)},
        {"samples": 2, "separators": (8, 17)},
        products=4,
    ),
]
