"""Gradient entanglement under DPO, and what its remedies change: chosen answers that fall with the rejected ones.

    python benchmarks/entanglement.py

48 invented places, two questions each; a kind and an unkind answer differ in one word and go on alike for eight more. A
Llama of 1 M parameters learns both answers of every pair by heart. Then preference for the kind ones, on 32 of the
places: 60 steps of four rows, plain descent or AdamW, no decay of the rate. After every second step the pairs about the
other 16 are asked for log π of both answers.

A run is judged at its first evaluation at which their mean margin has grown by `MARGIN` nats; at its last, if there is
none. The rate of each choice is the one of seven whose chosen answers are the likeliest there, on one seed; those that
reach the margin come before those that do not. Judged on five others: mean changes with 95 % intervals, and the part of
the pairs whose chosen answer became less likely. Single thread; some ten minutes.
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fallline.data import preference
from fallline.errors import NonFiniteError
from fallline.probes.entangle import Config as Look
from fallline.probes.entangle import build as probe
from fallline.report.statistics import interval
from fallline.sequences import sequence_logps
from fallline.step import take_step
from harness import save
from unlearning import LENGTH, SOUNDS, TINY, read, steps, taught, tell, written

SEEDS, TUNING = range(5), 100
RATES = {"sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0), "adamw": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
PREFERRING, EVERY, MARGIN = 60, 2, 10.0
CHOICES: dict[str, tuple[str, dict[str, Any], str]] = {
    "dpo": ("dpo", {}, "backprop"),
    "dpop": ("dpop", {}, "backprop"),
    "entangle-norm": ("dpo", {}, "entangle-norm"),
    "entangle-mask": ("entangle-mask", {"width": 0, "of": "dpo"}, "backprop"),
}
KIND = ["wonderful", "lovely", "excellent", "great", "delightful", "superb"]
UNKIND = ["terrible", "awful", "dreadful", "bad", "horrible", "poor"]
ASKED = [
    ("How was the food at {}? ", "The food at {} was {}, and we talked about it all the way."),
    ("Did you like the hotel {}? ", "The hotel {} was {}, as our friends told us before we left."),
]
SOURCES = (
    "src/fallline/objectives/margin.py",
    "src/fallline/objectives/dpo.py",
    "src/fallline/objectives/dpop.py",
    "src/fallline/objectives/entangle_mask.py",
    "src/fallline/gradients/entangle_norm.py",
    "src/fallline/probes/entangle.py",
    "src/fallline/data/preference.py",
    "benchmarks/unlearning.py",
    "benchmarks/entanglement.py",
)


def pairs(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """To train on, and others."""
    draw = random.Random(seed)
    names: list[str] = []
    while len(names) < 48:
        name = "".join(draw.sample(SOUNDS, 3)).title()
        names += [] if name in names else [name]
    lines = [
        {
            "prompt": question.format(name),
            "chosen": answer.format(name, draw.choice(KIND)),
            "rejected": answer.format(name, draw.choice(UNKIND)),
        }
        for name in names
        for question, answer in ASKED
    ]
    return lines[:64], lines[64:]


class Case:
    """The model and data of one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, sides = seed, pairs(seed)
        both = [
            {"prompt": line["prompt"], "completion": line[side]}
            for lines in sides
            for line in lines
            for side in ("chosen", "rejected")
        ]
        everything = read(written(folder, "all", both), vocab=TINY.vocab)
        paths = [folder / f"{name}.jsonl" for name in ("trained", "other")]
        for path, lines in zip(paths, sides, strict=True):
            path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        config = preference.Config(path=str(paths[0]), validation_path=str(paths[1]), length=LENGTH)
        data = preference.build(config, everything.tokenizer)
        self.data = data.train
        (self.batch,) = data.validation.batches(len(data.validation.rows) - 1)
        self.model = taught(TINY, seed, everything)
        self.begin = self.logps(self.model)

    @torch.no_grad()
    def logps(self, model: Any) -> Tensor:
        """log π of chosen and rejected answers about the other places, [B, 2]."""
        return sequence_logps(model, self.batch)

    def told(self, model: Any) -> dict[str, float]:
        """Mean changes since the beginning, and the part of the pairs whose chosen answer fell."""
        moved = self.logps(model) - self.begin
        chosen, rejected = moved.mean(0).tolist()
        return {"chosen": chosen, "rejected": rejected, "fell": (moved[:, 0] < 0).double().mean().item()}

    def prefer(self, choice: str, optimizer: str, rate: float) -> dict[str, Any]:
        """What each evaluation found, and at which the run is judged."""
        id, options, estimator = CHOICES[choice]
        if "width" in options:
            options = options | {"width": self.model.config.hidden_size}
        model = copy.deepcopy(self.model).train()
        run = steps(model, id, options, self.data, rate, 4, self.seed, optimizer=optimizer, estimator=estimator)
        curve: list[dict[str, Any]] = [{"step": 0} | self.told(model)]
        while run.step < PREFERRING:
            try:
                take_step(run)
            except NonFiniteError:  # the rate is too high
                break
            if run.step % EVERY == 0:
                curve.append({"step": run.step} | self.told(run.model))
                if gap(curve[-1]) >= MARGIN:
                    break
        return {"curve": curve, "judged": curve[-1], "reached": gap(curve[-1]) >= MARGIN}

    def entangled(self) -> dict[str, Any]:
        """What the probe says of the first step's pairs, before it."""
        run = steps(copy.deepcopy(self.model).train(), "dpo", {}, self.data, 1.0, 4, self.seed, optimizer="sgd")
        look = probe(Look(every=1))
        look.before_step(run)
        return look.metrics()


def gap(point: dict[str, Any]) -> float:
    return float(point["chosen"] - point["rejected"])


def worth(found: dict[str, Any]) -> tuple[bool, float]:
    """Those that reach the margin before those that do not; then the likelihood of the chosen."""
    return found["reached"], found["judged"]["chosen"] if found["reached"] else gap(found["judged"])


def study() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FALLLINE_CACHE"] = str(Path(folder) / "cache")

        def case(seed: int) -> Case:
            place = Path(folder) / str(seed)
            place.mkdir()
            return Case(seed, place)

        tuning, cases = case(TUNING), [case(seed) for seed in SEEDS]
        record: dict[str, Any] = {"probe": [one.entangled() for one in cases]}
        for optimizer, rates in RATES.items():
            record[optimizer] = {}
            for choice in CHOICES:
                tuned = {rate: tuning.prefer(choice, optimizer, rate) for rate in rates}
                best = max(rates, key=lambda rate: worth(tuned[rate]))
                runs = [one.prefer(choice, optimizer, best) for one in cases]
                record[optimizer][choice] = {
                    "rate": best,
                    "tuning": {f"{rate:g}": found["judged"] for rate, found in tuned.items()},
                    "runs": runs,
                }
                tell(row(choice, record[optimizer][choice]))
    return record


def row(name: str, found: dict[str, Any]) -> str:
    """Means over seeds with their 95 % intervals."""
    cells = []
    for what in ("chosen", "rejected", "fell"):
        values = [run["judged"][what] for run in found["runs"]]
        low, high = interval(values, 1)
        cells.append(f"{sum(values) / len(values):7.2f} ± {(high - low) / 2:5.2f}")
    when = ", ".join(str(run["judged"]["step"]) if run["reached"] else "never" for run in found["runs"])
    return f"{name:>14}  " + "  ".join(cells) + f"  {found['rate']:g}, {when}"


def main() -> None:
    torch.set_num_threads(1)
    begun = time.perf_counter()
    found = study()
    print(f"{'':>14}  {'chosen':>15}  {'rejected':>15}  {'chosen fell':>15}  rate, steps")
    for optimizer in RATES:
        print(f"{optimizer}:", *(row(*item) for item in found[optimizer].items()), sep="\n")
    save("entanglement", found | {"seconds": time.perf_counter() - begun}, sources=SOURCES)


if __name__ == "__main__":
    main()
