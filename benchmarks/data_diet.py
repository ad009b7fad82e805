"""Which examples to keep: `data-diet` on scikit-learn's handwritten digits.

    python benchmarks/data_diet.py

1797 images of 8 × 8, for each of five seeds divided anew into 898 to train on, 199 to validate on and 700 to test on;
an MLP 64-128-10. Ten models of different seeds are trained for a tenth of the steps, their EL2N and GraNd scores of the
training images are averaged, a share is kept, and a new model is trained from scratch on it: the same number of steps,
batch, rate and schedule for all, the rate tuned once on the validation images without pruning. The second half repeats
it with 10 % of the training labels replaced by wrong ones, and with an offset that drops the highest tenth of the
scores. Every figure has the 95 % interval of its mean over the seeds; differences to random removal are paired by seed
and the intervals of those of a table hold all at once.

What is chosen and drawn is the sampler's own code, `data_diet.chosen` and `uniform.Epochs`; the recipe is the paper's,
SGD with Nesterov momentum 0.9, weight decay 5e-4 and the rate times 0.2 after 30, 60 and 80 % of the steps.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fallline.data.data_diet import Config, chosen
from fallline.data.uniform import Epochs
from fallline.noise import rng
from fallline.per_example import Norms, PerExample
from fallline.report.statistics import interval
from fallline.token_errors import error_norms
from harness import ROOT, save

SEEDS = range(5)
MODELS = 10
STEPS, SHORT, BATCH = 1400, 140, 32  # 50 epochs of all images, 5 of them before scoring
RATES = (0.01, 0.03, 0.1, 0.3)
TRAIN, VALIDATION = 898, 199
FLIPPED = 0.1
SOURCES = (
    "src/fallline/data/data_diet.py",
    "src/fallline/data/uniform.py",
    "src/fallline/noise.py",
    "src/fallline/report/statistics.py",
    "src/fallline/token_errors.py",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src/fallline/per_example").glob("*.py")),
    "benchmarks/data_diet.py",
)

CHOICES = {
    "random": ("el2n", {"order": "random"}),
    "hardest by EL2N": ("el2n", {}),
    "hardest by GraNd": ("grand", {}),
    "easiest by EL2N": ("el2n", {"order": "easiest"}),
}
AFTER_OFFSET = {
    "hardest by EL2N after the top tenth": ("el2n", {"offset": FLIPPED}),
    "hardest by GraNd after the top tenth": ("grand", {"offset": FLIPPED}),
}


class Digits(NamedTuple):
    """One seed's data: images [n, 64] and labels [n], and which training labels were flipped, [898] bool."""

    x: Tensor
    y: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    flipped: Tensor


def digits(seed: int, noise: float) -> Digits:
    """The images in an order of this seed, divided; a part of the training labels is replaced by wrong ones."""
    found: Any = load_digits()
    order = torch.randperm(len(found.target), generator=rng(seed, 0, "split"))
    x, y = torch.tensor(found.data, dtype=torch.float32)[order] / 16, torch.tensor(found.target)[order].long()
    g = rng(seed, 0, "flips")
    flipped = torch.zeros(TRAIN, dtype=torch.bool)
    flipped[torch.randperm(TRAIN, generator=g)[: round(noise * TRAIN)]] = True
    wrong = (y[:TRAIN] + torch.randint(1, 10, (TRAIN,), generator=g)) % 10
    x, y, held = x - x[:TRAIN].mean(0), torch.where(flipped, wrong, y[:TRAIN]), y[TRAIN:]
    rest = x[TRAIN:]
    return Digits(x[:TRAIN], y, (rest[:VALIDATION], held[:VALIDATION]), (rest[VALIDATION:], held[VALIDATION:]), flipped)


def trained(x: Tensor, y: Tensor, seed: int, rate: float, steps: int = STEPS) -> nn.Module:
    """A new MLP after the first `steps` of the recipe's `STEPS`."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    epochs = Epochs(len(x), BATCH, seed)
    for step in range(steps):
        if step in (int(0.3 * STEPS), int(0.6 * STEPS), int(0.8 * STEPS)):
            optimizer.param_groups[0]["lr"] *= 0.2
        rows = epochs(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def scores(data: Digits, seed: int, rate: float) -> dict[str, Tensor]:
    """EL2N and GraNd of the training images, each [898], averaged over models that are not tested."""
    sums = {"el2n": torch.zeros(TRAIN), "grand": torch.zeros(TRAIN)}
    for i in range(MODELS):
        model = trained(data.x, data.y, 1000 + MODELS * seed + i, rate, SHORT)
        norms = Norms()
        with PerExample(model).watch(TRAIN, norms):
            z = model(data.x)
            F.cross_entropy(z, data.y, reduction="sum").backward()
        sums["el2n"] += error_norms(z.detach(), data.y)
        sums["grand"] += norms.total().sqrt()
    return {name: total / MODELS for name, total in sums.items()}


def study(keeps: tuple[float, ...], choices: dict[str, Any], noise: float, rate: float) -> dict[str, Any]:
    """Test accuracies of every choice at every share, and how many of the kept labels were flipped."""
    cells: dict[str, dict[str, list[float]]] = {}
    top, agree = [], []
    for seed in SEEDS:
        data = digits(seed, noise)
        found = scores(data, seed, rate)
        agree.append(torch.corrcoef(torch.stack([s.argsort().argsort().float() for s in found.values()]))[0, 1].item())
        hardest = chosen(found["el2n"], Config(scores="", keep=FLIPPED), seed)
        top.append(data.flipped[hardest].float().mean().item())
        plan = {"all": torch.arange(TRAIN)} | {
            f"{name}, keep {keep:.0%}": chosen(found[by], Config(scores="", keep=keep, **options), seed)
            for keep in keeps
            for name, (by, options) in choices.items()
        }
        for name, kept in plan.items():
            cell = cells.setdefault(name, {"accuracy": [], "flipped": []})
            cell["accuracy"].append(accuracy(trained(data.x[kept], data.y[kept], seed, rate), *data.test))
            cell["flipped"].append(data.flipped[kept].float().mean().item())
    comparisons = len(keeps) * (len(choices) - 1)
    table = {}
    for name, cell in cells.items():
        found_here = cell["accuracy"]
        low, high = interval(found_here, 1)
        row = {"mean": statistics.fmean(found_here), "half_interval": (high - low) / 2, "seeds": found_here}
        row["flipped"] = statistics.fmean(cell["flipped"])
        base = cells.get(f"random, {name.partition(', ')[2]}", cell)["accuracy"]
        if base is not found_here:
            gains = [a - b for a, b in zip(found_here, base, strict=True)]
            row["minus_random"] = dict(
                zip(("mean", "low", "high"), (statistics.fmean(gains), *interval(gains, comparisons)), strict=True)
            )
        table[name] = row
    return {
        "rows": table,
        "flipped_in_the_hardest_tenth": statistics.fmean(top),
        "rank_correlation_el2n_grand": statistics.fmean(agree),
    }


def tuned() -> tuple[float, dict[str, float]]:
    """The rate with the highest validation accuracy without pruning, averaged over the seeds, and all of them."""
    found = {}
    for rate in RATES:
        each = [digits(seed, 0) for seed in SEEDS]
        right = [accuracy(trained(d.x, d.y, 500 + s, rate), *d.validation) for s, d in zip(SEEDS, each, strict=True)]
        found[rate] = statistics.fmean(right)
    best = max(found, key=lambda rate: found[rate])
    return best, {str(rate): value for rate, value in found.items()}


def show(title: str, found: dict[str, Any]) -> None:
    print(
        f"\n{title}: test accuracy, minus random removal; {found['flipped_in_the_hardest_tenth']:.0%} of the hardest "
        f"tenth by EL2N are flipped; EL2N and GraNd rank alike by {found['rank_correlation_el2n_grand']:.3f}"
    )
    for name, row in found["rows"].items():
        gain = row.get("minus_random")
        said = f"{100 * gain['mean']:+6.2f} [{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]" if gain else ""
        flips = f"flipped {row['flipped']:5.1%}" if row["flipped"] else ""
        print(f"  {name:<48} {100 * row['mean']:6.2f} ± {100 * row['half_interval']:.2f}  {said:<24} {flips}")


def main() -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    rate, rates = tuned()
    print(f"rate {rate:g}; validation accuracy of {rates}")
    clean = study((0.7, 0.5, 0.3, 0.1), CHOICES, 0.0, rate)
    show("clean labels", clean)
    noisy = study((0.5, 0.3), CHOICES | AFTER_OFFSET, FLIPPED, rate)
    show("10 % of the labels flipped", noisy)
    assert all(math.isfinite(row["mean"]) for row in clean["rows"].values())
    record = {"rate": rate, "validation": rates, "clean": clean, "flipped": noisy}
    print(save("data_diet", record | {"seconds": time.perf_counter() - start}, SOURCES))


if __name__ == "__main__":
    main()
