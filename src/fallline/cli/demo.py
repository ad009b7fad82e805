"""`fallline demo`: a comparison of three optimizers on an embedded recipe, in a given time."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..drivers.compare.choices import Choice
from ..drivers.compare.measuring import ROUNDS, SECONDS
from ..drivers.compare.run import answer
from ..drivers.compare.study import Study
from ..drivers.evaluation import evaluate
from ..drivers.folder import next_free
from ..drivers.setting import Setting, build
from ..recipe import Recipe
from ..report import table
from ..step import take_step

OPTIMIZERS = ("adamw", "sgd", "scale")

#: What a machine with two ordinary cores does within the default budget; fewer only where time runs short.
STEPS = 500
FEWEST = 10
EVALUATIONS = 12

RECIPE = """
model: {name: llama, preset: tiny}
data: {name: python-docs, length: 128, vocab: 2048}
schedule: {name: linear, warmup: 0.05}
batch: 8
clip: 1.0
sample: 0
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of one step and of one evaluation."""

    step: float
    evaluation: float


def rates() -> dict[str, Any]:
    """The committed tuning record: the command that made it, and for each optimizer its best learning rate."""
    record: dict[str, Any] = json.loads((files("fallline") / "cli" / "demo_rates.json").read_text(encoding="utf-8"))
    return record


def recipe(optimizer: str, lr: float, steps: int, out: Path | None = None, seed: int = 0) -> Recipe:
    """The demo's recipe for one optimizer."""
    more = [f"out={out}"] if out is not None else []
    every = max(1, steps // EVALUATIONS)
    return Recipe.parse(
        RECIPE,
        f"optimizer={optimizer}",
        f"optimizer.lr={lr!r}",
        f"steps={steps}",
        f"seed={seed}",
        f"eval.every={every}",
        *more,
        origin="demo",
        name="demo",
    )


def measure(setting: Setting) -> Cost:
    """Time a few steps after one to warm up, and an evaluation. The setting is spent afterwards."""
    take_step(setting.run)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        take_step(setting.run)
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    evaluate(setting.run, setting.dataset.validation, setting.recipe.eval.rows)
    return Cost(statistics.median(times), time.perf_counter() - start)


def fit(costs: list[Cost], seconds: float, start: float) -> int:
    """The number of steps, the same for every optimizer, that fits `seconds`; between FEWEST and STEPS.

    Args:
        costs: of each optimizer.
        seconds: that are left.
        start: seconds to build what one optimizer needs; each is started again to be measured.
    """
    # Checkpoints and slower moments of a shared machine take a fifth.
    turns = 2 * (ROUNDS + 1) * max(SECONDS, max(cost.step for cost in costs))
    left = 0.8 * seconds - sum((EVALUATIONS + 2) * cost.evaluation + start + turns for cost in costs)
    return max(FEWEST, min(STEPS, int(left / sum(cost.step for cost in costs))))


def demo(budget: float, out: str | None) -> int:
    """Compare the optimizers at their tuned rates, and print the table."""
    start = time.perf_counter()
    record = rates()
    lr = {name: record["best"][name] for name in OPTIMIZERS}
    costs = []
    for name in OPTIMIZERS:
        setting = build(recipe(name, lr[name], STEPS))
        costs.append(measure(setting))
    model, data = setting.record["model"], setting.record["data"]
    spent = time.perf_counter() - start
    steps = fit(costs, budget - spent, spent / len(OPTIMIZERS))
    print(
        f"A Llama of {model['parameters'] / 1e6:.2f} M parameters on {data['characters'] / 1e6:.2f} M characters of "
        f"Python's own documentation, 8 × 128 tokens a step, {steps} steps with each optimizer, "
        f"{torch.get_num_threads()} threads.",
        flush=True,
    )
    if steps < STEPS:
        print(f"A step takes {1e3 * costs[0].step:.0f} ms here: {steps} steps fit {budget:.0f} s instead of {STEPS}.")

    choices = (Choice(name, {"optimizer.lr": f"{lr[name]:g}"}, recipe(name, lr[name], steps)) for name in OPTIMIZERS)
    note = f"Each optimizer has the learning rate that was best for it in {record['file']}, made by {record['command']}"
    study = Study(
        name="demo",
        command="fallline demo",
        choices=tuple(choices),
        seeds=(1,),  # the rates were chosen on seed 0
        notes=(f"{note}, with {record['steps']} steps and seed 0.",),
    )
    found = answer(study, Path(out) if out is not None else next_free("demo"))
    print()
    print(table(found.report))
    if found.signal is not None:
        return 128 + found.signal
    print(f"\nTook {time.perf_counter() - start:.0f} s of {budget:.0f} s. Open the report: {found.out / 'report.html'}")
    return 0
