"""Forgetting, written from the papers' equations: one example after another, label by label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fallline.contracts import Batch, Draw

from . import Reference, Row, Texts

KEPT = (2, 4, 7)
"""Which examples are to be kept."""

ANSWERS = {0: 2, 1: 4, 3: 3, 5: 1, 6: 3}
"""How many tokens of what is to be forgotten are of the answer; the rest is the refusal. 3 has no label, 6 none in its
refusal."""


class Streams(Texts):
    """The examples of `Texts`, three of them to be kept, of the others each with a refusal."""

    def __call__(self, draw: Draw, rng: torch.Generator) -> Batch:
        batch = super().__call__(draw, rng)
        packed = "segment" in batch
        if not packed:
            batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"]).clone()
        batch["side"] = torch.zeros_like(batch["labels"])
        for b, i in enumerate(draw.ids.tolist()):
            here = batch["segment"] == b if packed else torch.arange(len(draw.ids)).unsqueeze(1) == b
            second = here & (batch["position_ids"] >= ANSWERS.get(i, 99))
            batch["side"][second] = 1
            batch["position_ids"][second] -= ANSWERS.get(i, 0)
        batch["domain"] = torch.tensor([int(i in KEPT) for i in draw.ids.tolist()])
        return batch


Labels = list[tuple[Tensor, int]]
"""Of a sequence: (logits [V], label) of each label."""


def nll(labels: Labels) -> Tensor:
    return sum((z.exp().sum().log() - z[y] for z, y in labels), torch.zeros((), dtype=torch.float64))


def mean_p(labels: Labels) -> Tensor:
    return sum(z[y].exp() / z.exp().sum() for z, y in labels) / len(labels)


def kl(labels: Labels, began: Labels) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for (z, _), (a, _) in zip(labels, began, strict=True):
        p, q = z.exp() / z.exp().sum(), a.exp() / a.exp().sum()
        total = total + (q * (q / p).log()).sum()
    return total


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


Forget = Callable[[Labels, Labels, Labels, Any], dict[str, Tensor]]


def forgetting(forget: Forget, needs: tuple[int, ...] = (0,), divergence: bool = False) -> Reference:
    """`forget`: answer, refusal, the answer to the model as the run began, options → terms."""

    def reference(logits: Tensor, batch: Batch, o: Any) -> dict[str, Tensor]:
        def labels(said: Tensor, b: int, side: int) -> Labels:
            rows = zip(said[b], batch["labels"][b].tolist(), batch["side"][b].tolist(), strict=True)
            return [(z, y) for z, y, s in rows if y >= 0 and s == side]

        began = batch.get("reference_logits", logits)
        found: list[dict[str, Tensor]] = []
        for b, domain in enumerate(batch["domain"].tolist()):
            answer, refusal, first = labels(logits, b, 0), labels(logits, b, 1), labels(began, b, 0)
            if domain == 0:
                found.append(forget(answer, refusal, first, o) if all((answer, refusal)[s] for s in needs) else {})
            else:
                by_kl = divergence or getattr(o, "keep", "") == "kl"
                found.append({"retain": getattr(o, "retain", 0.0) * (kl(answer, first) if by_kl else nll(answer))})
        zero = torch.zeros((), dtype=torch.float64)
        terms = dict.fromkeys(term for row in found for term in row)
        return {t: torch.stack([row.get(t, zero) for row in found]) for t in sorted(terms, key="retain".__eq__)}

    return reference


def ga(answer: Labels, refusal: Labels, first: Labels, o: Any) -> dict[str, Tensor]:
    return {"forget": -getattr(o, "forget", 1.0) * nll(answer)}


def idk(answer: Labels, refusal: Labels, first: Labels, o: Any) -> dict[str, Tensor]:
    return {"forget": o.forget * nll(refusal)}


def npo(answer: Labels, refusal: Labels, first: Labels, o: Any) -> dict[str, Tensor]:
    return {"forget": -o.forget * 2 / o.beta * sigma(o.beta * (nll(answer) - nll(first))).log()}


def simnpo(answer: Labels, refusal: Labels, first: Labels, o: Any) -> dict[str, Tensor]:
    return {"forget": -o.forget * 2 / o.beta * sigma(o.beta * (nll(answer) / len(answer) - o.delta)).log()}


def conjugate(kind: str, v: Tensor) -> Tensor:
    """f*(g*(v)) with f* in closed form of t = g*(v)."""
    t = variational(kind, v)
    if kind == "kl":
        return (t - 1).exp()
    if kind == "pearson":
        return t**2 / 4 + t
    if kind == "jensen-shannon":
        return -(2 - t.exp()).log()
    if kind == "jeffrey":  # w = W(e^{1 − t}) by Newton's method
        w = torch.ones_like(t)
        for _ in range(40):
            w = w - (w * w.exp() - (1 - t).exp()) / (w.exp() * (1 + w))
        return w + 1 / w + t - 2
    if kind == "reverse-kl":
        return -1 - (-t).log()
    if kind == "hellinger":
        return t / (1 - t)
    return 2 - 2 * (1 - t).sqrt() if kind == "neyman" else t


def variational(kind: str, v: Tensor) -> Tensor:
    """g*(v)."""
    if kind == "total-variation":
        return (v.exp() - (-v).exp()) / (v.exp() + (-v).exp()) / 2
    if kind == "jensen-shannon":
        return (2 / (1 + (-v).exp())).log()
    if kind == "reverse-kl":
        return -((-v).exp())
    return 1 - (-v).exp() if kind in ("hellinger", "neyman") else v


def flat(answer: Labels, refusal: Labels, first: Labels, o: Any) -> dict[str, Tensor]:
    kind = o.divergence
    return {"template": -variational(kind, mean_p(refusal)), "forget": conjugate(kind, mean_p(answer))}


def kept(batch: Batch) -> int:
    return int((batch["labels"][batch["domain"] == 1] >= 0).sum())


KINDS = ("kl", "pearson", "jensen-shannon", "jeffrey", "reverse-kl", "hellinger", "neyman")
PULL = {"forget": 0.7, "retain": 1.3}
ROWS = [
    Row("ga", forgetting(ga), source=Streams),
    Row("graddiff", forgetting(ga), PULL, {"forget": 0.2, "retain": 0.1}, Streams),
    Row("kl-retain", forgetting(ga, divergence=True), PULL, {"forget": 0.2, "retain": 0.1}, Streams, more=kept),
    Row("idk", forgetting(idk, (1,)), PULL, {"forget": 0.2, "retain": 0.1}, Streams),
    Row(
        "npo", forgetting(npo), PULL | {"beta": 0.3}, {"beta": 0.1, "forget": 0.2, "retain": 0.1, "keep": "kl"},
        Streams, products=4,
    ),
    Row(
        "npo", forgetting(npo), PULL | {"beta": 0.3, "keep": "kl"}, {}, Streams,
        products=4, more=lambda batch: 2 * kept(batch), name="npo-kl",
    ),
    Row(
        "simnpo", forgetting(simnpo), PULL | {"beta": 0.8, "delta": 1.0},
        {"beta": 0.1, "delta": 0.0, "forget": 0.2, "retain": 0.1}, Streams, products=4,
    ),
    Row("flat", forgetting(flat, (0, 1)), {}, {"divergence": "kl"}, Streams, products=4),
]  # fmt: skip
