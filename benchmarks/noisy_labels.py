"""Likelihoods on wrong labels: ten Gaussian blobs, a part of whose training labels is replaced at random.

    python benchmarks/noisy_labels.py

For each of five seeds ten means in 20 dimensions of unit variance, and unit noise around them; 2000 points to train on,
1000 to validate on, 5000 to test on; an MLP 20-128-10, Adam, 60 epochs of batches of 100, no decay, no early stop. With
probability 40 % a label of training **and validation** is drawn anew, uniformly; the labels of the test are right. The
learning rate of each choice is tuned alike: five rates on two other seeds, the best mean accuracy on validation. Then
the test accuracy over five seeds, with 95 % intervals of the mean and of the differences to cross-entropy, paired by
seed, which hold all at once.

The losses are the objectives' own rules. Single thread; about a minute.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fallline.cross_entropy import full_cross_entropy
from fallline.data.uniform import Epochs
from fallline.noise import rng
from fallline.objectives import aldr_kl, comp_sum, ldr_k, ldr_kl
from fallline.report.statistics import interval
from harness import save

SEEDS, TUNING = range(5), range(100, 102)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
EPOCHS, BATCH, WORDS, FEATURES = 60, 100, 10, 20
TRAIN, VALIDATION, TEST = 2000, 1000, 5000
NOISE = 0.4
SOURCES = (
    "src/fallline/objectives/aldr_kl.py",
    "src/fallline/objectives/comp_sum.py",
    "src/fallline/objectives/ldr_k.py",
    "src/fallline/objectives/ldr_kl.py",
    "src/fallline/objectives/per_token.py",
    "src/fallline/cross_entropy.py",
    "src/fallline/data/uniform.py",
    "src/fallline/report/statistics.py",
    "benchmarks/noisy_labels.py",
)

CHOICES: dict[str, Any] = {
    "causal": comp_sum.build(comp_sum.Config(tau=1)),
    "comp-sum, tau 1.7": comp_sum.build(comp_sum.Config(tau=1.7)),
    "comp-sum, tau 2": comp_sum.build(comp_sum.Config(tau=2)),
    "ldr-kl, temperature 1": ldr_kl.build(ldr_kl.Config(temperature=1)),
    "ldr-kl, temperature 10": ldr_kl.build(ldr_kl.Config(temperature=10)),
    "ldr-k, k 5": ldr_k.build(ldr_k.Config(k=5)),
    "aldr-kl, temperature 10": aldr_kl.build(aldr_kl.Config(temperature=10)),
}


class Blobs(NamedTuple):
    """Points and labels, [n, 20] and [n]."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def blobs(seed: int) -> Blobs:
    g = rng(seed, 0, "blobs")
    means = torch.randn(WORDS, FEATURES, generator=g)
    found = []
    for n in (TRAIN, VALIDATION, TEST):
        y = torch.randint(WORDS, (n,), generator=g)
        x = means[y] + torch.randn(n, FEATURES, generator=g)
        again, anew = torch.rand(n, generator=g) < NOISE, torch.randint(WORDS, (n,), generator=g)
        found.append((x, torch.where(again, anew, y) if n != TEST else y))
    return Blobs(*found)


def trained(points: tuple[Tensor, Tensor], objective: Any, rate: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, WORDS))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    epochs = Epochs(TRAIN, BATCH, seed)
    x, y = points
    for step in range(EPOCHS * TRAIN // BATCH):
        rows = epochs(step)
        optimizer.zero_grad()
        full_cross_entropy(model(x[rows]), y[rows], objective.rule).mean().backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, points: tuple[Tensor, Tensor]) -> float:
    return (model(points[0]).argmax(1) == points[1]).float().mean().item()


def tuned(objective: Any, data: list[Blobs]) -> dict[str, float]:
    """Rate → the mean accuracy on the noisy validation labels."""
    return {
        str(rate): statistics.fmean(
            accuracy(trained(d.train, objective, rate, s), d.validation) for s, d in zip(TUNING, data, strict=True)
        )
        for rate in RATES
    }


def study() -> dict[str, Any]:
    tuning, final = [blobs(s) for s in TUNING], [blobs(s) for s in SEEDS]
    table: dict[str, Any] = {}
    for name, objective in CHOICES.items():
        rates = tuned(objective, tuning)
        best = max(RATES, key=lambda rate: rates[str(rate)])
        found = [accuracy(trained(d.train, objective, best, s), d.test) for s, d in zip(SEEDS, final, strict=True)]
        low, high = interval(found, 1)
        row = {"rate": best, "validation": rates, "mean": statistics.fmean(found), "half_interval": (high - low) / 2}
        table[name] = row | {"seeds": found}
        if name != "causal":
            gains = [a - b for a, b in zip(found, table["causal"]["seeds"], strict=True)]
            low, high = interval(gains, len(CHOICES) - 1)
            table[name]["minus_causal"] = {"mean": statistics.fmean(gains), "low": low, "high": high}
        show(name, table[name])
    return table


def show(name: str, row: dict[str, Any]) -> None:
    gain = row.get("minus_causal")
    said = f"{100 * gain['mean']:+6.2f} [{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]" if gain else ""
    edge = " (edge)" if row["rate"] in (RATES[0], RATES[-1]) else ""
    mean = f"{100 * row['mean']:6.2f} ± {100 * row['half_interval']:.2f}"
    print(f"  {name:<26} rate {row['rate']:<7g} {mean}  {said}{edge}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(f"{NOISE:.0%} of the labels drawn anew: test accuracy, minus cross-entropy")
    found = study()
    print(save("noisy_labels", {"choices": found, "seconds": time.perf_counter() - start}, SOURCES))


if __name__ == "__main__":
    main()
