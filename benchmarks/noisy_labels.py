"""Likelihoods on wrong labels: handwritten digits, a part of whose training labels is replaced at random.

    python benchmarks/noisy_labels.py

scikit-learn's 1797 digits of 8 × 8 pixels, divided anew by each of ten seeds: 900 to train on, 300 to validate on, 597
to test on; an MLP 64-128-10, Adam, 60 epochs of batches of 100, no decay, no early stop. With probability 0, 20, 40 or
60 % a label of training **and validation** is drawn anew, uniformly; the labels of the test are right. The learning
rate of each choice is tuned alike for each part: seven rates on two other seeds, the best mean accuracy on validation.
Then the test accuracy over ten seeds, with 95 % intervals of the mean and of the differences to cross-entropy, paired
by seed, which hold all at once. The same once more with one high rate for all, at which there is time to learn the
wrong labels by heart.

The losses are the objectives' own rules. All models of a round are trained side by side, as batched products with a
learning rate for each; Adam is written out for that. Single thread; some three minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fallline.cross_entropy import full_cross_entropy
from fallline.data.uniform import Epochs
from fallline.noise import rng
from fallline.objectives import aldr_kl, comp_sum, ldr_k, ldr_kl
from fallline.report.statistics import interval
from harness import save

SEEDS, TUNING = range(10), range(100, 102)
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
COMMON = 1e-2
EPOCHS, BATCH, WORDS, FEATURES = 60, 100, 10, 64
PARTS = TRAIN, VALIDATION, TEST = 900, 300, 597
NOISE = (0.0, 0.2, 0.4, 0.6)
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


class Points(NamedTuple):
    """Digits and labels, [n, 64] and [n]."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def points(seed: int, noise: float) -> Points:
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    g = rng(seed, 0, "digits")
    order = torch.randperm(len(y), generator=g)
    x, y = (x[order] / 16).float(), y[order]
    again, anew = torch.rand(len(y), generator=g) < noise, torch.randint(WORDS, (len(y),), generator=g)
    again[TRAIN + VALIDATION :] = False
    parts = zip(x.split(PARTS), torch.where(again, anew, y).split(PARTS), strict=True)
    return Points(*parts)


def initial(seed: int) -> list[Tensor]:
    """Weights [in, out] and biases [1, out] of an MLP as torch begins it."""
    torch.manual_seed(seed)
    layers = nn.Linear(FEATURES, 128), nn.Linear(128, WORDS)
    return [t for layer in layers for t in (layer.weight.detach().t(), layer.bias.detach()[None])]


def logits(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """[M, n, 10] of M models and their points [M, n, 64]."""
    W, b, U, c = params
    return torch.baddbmm(c, torch.relu(torch.baddbmm(b, x, W)), U)


def trained(seeds: Sequence[int], data: Sequence[Points], rates: Tensor) -> list[Tensor]:
    """Parameters of a model for each choice, rate and seed, in this order.

    Args:
        data: what each seed trains on. rates: [choices, rates], the learning rates of each choice.
    """
    times = rates.numel()
    params = [torch.stack(p).repeat(times, 1, 1).requires_grad_() for p in zip(*map(initial, seeds), strict=True)]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    rate = rates.flatten().repeat_interleave(len(seeds)).view(-1, 1, 1)
    epochs = [Epochs(TRAIN, BATCH, seed) for seed in seeds]
    for step in range(EPOCHS * TRAIN // BATCH):
        rows = [order(step) for order in epochs]
        x = torch.stack([d.train[0][r] for d, r in zip(data, rows, strict=True)]).repeat(times, 1, 1)
        y = torch.cat([d.train[1][r] for d, r in zip(data, rows, strict=True)]).repeat(rates.shape[1])
        each = logits(params, x).view(len(CHOICES), -1, WORDS)
        losses = [full_cross_entropy(z, y, o.rule).sum() for z, o in zip(each, CHOICES.values(), strict=True)]
        grads = torch.autograd.grad(torch.stack(losses).sum() / BATCH, params)
        with torch.no_grad():
            for p, g, m, v in zip(params, grads, first, second, strict=True):
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                root = (v / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
                p -= rate / (1 - 0.9 ** (step + 1)) * m / root
    return params


@torch.no_grad()
def accuracies(params: Sequence[Tensor], asked: Sequence[tuple[Tensor, Tensor]], rates: int) -> Tensor:
    """[choices, rates, seeds], each seed's models on its own points."""
    shape = len(CHOICES), rates, len(asked)
    found = torch.zeros(shape)
    for i, (x, y) in enumerate(asked):
        mine = [p.view(*shape, *p.shape[1:])[:, :, i].flatten(0, 1) for p in params]
        right = logits(mine, x.expand(len(mine[0]), -1, -1)).argmax(2) == y
        found[:, :, i] = right.float().mean(1).view(shape[:2])
    return found


def study(noise: float) -> dict[str, Any]:
    """Of one part of wrong labels: validation of all rates, test at the tuned and at the common one."""
    rates = torch.tensor(RATES).expand(len(CHOICES), -1)
    tuning, data = ([points(seed, noise) for seed in seeds] for seeds in (TUNING, SEEDS))
    validation = accuracies(trained(TUNING, tuning, rates), [d.validation for d in tuning], len(RATES)).mean(2)
    best = [RATES[i] for i in validation.argmax(1).tolist()]
    final = trained(SEEDS, data, torch.tensor([(rate, COMMON) for rate in best]))
    test = accuracies(final, [d.test for d in data], 2)
    record: dict[str, Any] = {
        "validation": {
            name: dict(zip(map(str, RATES), row, strict=True))
            for name, row in zip(CHOICES, validation.tolist(), strict=True)
        }
    }
    for i, said in enumerate(("tuned", "common rate")):
        print(f"{noise:.0%} wrong labels, {said}: test accuracy, minus cross-entropy")
        rows = zip(CHOICES, [COMMON] * len(best) if i else best, test[:, i].tolist(), strict=True)
        record[said] = compared({name: (rate, accuracy) for name, rate, accuracy in rows})
    return record


def compared(found: dict[str, tuple[float, list[float]]]) -> dict[str, Any]:
    """Mean, interval and difference to cross-entropy of each choice's accuracies."""
    table: dict[str, Any] = {}
    for name, (rate, accuracy) in found.items():
        low, high = interval(accuracy, 1)
        table[name] = {"rate": rate, "mean": statistics.fmean(accuracy), "half_interval": (high - low) / 2}
        table[name]["seeds"] = accuracy
        if name != "causal":
            gains = [a - b for a, b in zip(accuracy, found["causal"][1], strict=True)]
            low, high = interval(gains, 2 * (len(CHOICES) - 1))
            table[name]["minus_causal"] = {"mean": statistics.fmean(gains), "low": low, "high": high}
        show(name, table[name])
    return table


def show(name: str, row: dict[str, Any]) -> None:
    gain = row.get("minus_causal")
    said = f"{100 * gain['mean']:+6.2f} [{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]" if gain else ""
    mean = f"{100 * row['mean']:6.2f} ± {100 * row['half_interval']:.2f}"
    print(f"  {name:<26} rate {row['rate']:<8.2g} {mean}  {said}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = {f"{noise:.0%}": study(noise) for noise in NOISE}
    print(save("noisy_labels", found | {"seconds": time.perf_counter() - start}, SOURCES))


if __name__ == "__main__":
    main()
