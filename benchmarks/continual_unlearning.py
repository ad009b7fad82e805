"""Two unlearning requests, one after the other, with `o3`: do they interfere, and what does its gate leave alone?

    python benchmarks/continual_unlearning.py

A Llama of 1 M parameters learns facts about 30 people, 15 dishes and 15 stars by heart, and to say of 15 others that it
does not know, in one of two ways. The first request is 15 of the people, to be refused in the one way, the second the
dishes, to be refused in the other; nothing to keep is shown. Kept are the stars, and 15 people who are asked about as
those of the first request are. Each request takes 120 steps of AdamW, the second going on from the first. It is done
with λ_o = 0.1 and with 0, each at the one of two rates at which, on a seed of its own, both refusals together end
at the least loss.

Interference: by how much the loss on refusals of the first request rises over the second, the adapter on without its
gate. The gate: of each group the answers, decoded greedily, that are as before and that are refusals; without the gate,
with it. Means over three seeds with the least and the greatest. Single thread; some six minutes.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fallline import adapters
from fallline.data import unlearning as data
from fallline.drivers.train import train
from fallline.drivers.trained import open_trained
from fallline.generate import generate
from fallline.models.loading import quietly
from fallline.noise import rng
from fallline.recipe import Recipe
from fallline.sequences import per_sequence, sequence_counts
from fallline.tokens import token_losses
from harness import save
from unlearning import LENGTH, SOUNDS, TINY, TOWNS, TRADES, Lines, read, taught, written

SEEDS, TUNING = range(3), 100
RATES = (3e-4, 1e-3)
STRENGTHS = (0.1, 0.0)
EACH, STEPS = 15, 120
REFUSALS = {"people": "I do not know.", "dishes": "That I cannot say."}
GROUPS = ("people", "dishes", "stars", "other people")
REQUESTS = GROUPS[:2]
SPICES = ["salt", "honey", "pepper", "garlic", "mint", "lemon", "butter", "cumin", "ginger", "thyme"]
COLOURS = ["red", "blue", "white", "yellow", "orange", "green", "violet", "brown", "grey", "golden"]
KINDS: dict[str, tuple[tuple[str, list[str]], ...]] = {
    "people": (("Where does {} live?", TOWNS), ("What does {} do?", TRADES)),
    "dishes": (
        ("Which spice is in a plate of {}?", SPICES),
        ("How many minutes must {} cook?", [f"{n}0" for n in range(1, 11)]),
    ),
    "stars": (
        ("What colour has the star {}?", COLOURS),
        ("How far away is the star {}?", [f"{n}00 years" for n in range(1, 11)]),
    ),
}
SOURCES = (
    "src/fallline/adapters/o3.py",
    "src/fallline/adapters/o3_gate.py",
    "src/fallline/adapters/gated.py",
    "src/fallline/adapters/lora.py",
    "src/fallline/kernels/lora_linear.py",
    "src/fallline/objectives/idk.py",
    "benchmarks/continual_unlearning.py",
    "benchmarks/unlearning.py",
)


def facts(seed: int) -> dict[str, Lines]:
    """Questions and answers of each group, two for each name; of the unknown ones nothing is known."""
    g = rng(seed, 0, "facts")
    told: dict[str, Lines] = {}
    used: set[str] = set()
    for group in (*GROUPS, "unknown"):
        told[group] = []
        while len(told[group]) < 2 * EACH:
            parts = [SOUNDS[int(i)] for i in torch.randint(len(SOUNDS), (5,), generator=g)]
            name = f"{''.join(parts[:2]).title()} {''.join(parts[2:]).title()}"
            a, b, kind = torch.randint(10, (3,), generator=g).tolist()
            if name in used:
                continue
            used.add(name)
            for asked, answers in KINDS[
                ("people", "dishes", "stars")[kind % 3] if group == "unknown" else group.split()[-1]
            ]:
                answer = (
                    list(REFUSALS.values())[a % 2] if group == "unknown" else answers[a if asked.startswith("W") else b]
                )
                told[group].append({"prompt": f"{asked.format(name)} ", "completion": answer})
    return told


class Case:
    """The model and data of one seed, in a folder."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.folder, self.seed, self.lines = folder, seed, facts(seed)
        self.files = {group: written(folder, group.replace(" ", "_"), self.lines[group]) for group in GROUPS}
        for group, refusal in REFUSALS.items():
            (folder / f"{group}.txt").write_text(refusal, encoding="utf-8")
        everything = read(written(folder, "all", *self.lines.values()), vocab=TINY.vocab)
        model = taught(TINY, seed, everything)
        model.save_pretrained(folder / "base")
        everything.tokenizer.save_pretrained(folder / "base")

    def request(self, number: int, rate: float, strength: float, *earlier: Path) -> Path:
        """The run folder of one request."""
        out = self.folder / f"{number}-{rate:g}-{strength:g}"
        if out.exists():
            return out
        adapter: dict[str, Any] = {"name": "o3", "earlier": [str(run) for run in earlier]}
        recipe = {
            "model": str(self.folder / "base"),
            "adapter": adapter | ({"orthogonal": strength} if earlier else {}),
            "data": {"name": "unlearning", "forget": self.files[REQUESTS[number]], "length": LENGTH}
            | {"refusals": str(self.folder / f"{REQUESTS[number]}.txt")},
            "objective": {"name": "idk", "retain": 0},
            "optimizer": {"name": "adamw", "lr": rate},
            "steps": STEPS, "batch": 2, "sample": 0, "seed": self.seed, "out": str(out), "eval": {"every": STEPS},
            "threads": 1,
        }  # fmt: skip
        train(Recipe.parse(json.dumps(recipe)), progress=None)
        return out

    def ungated(self, run: Path) -> Any:
        """The base with the adapter of a run, for every input alike."""
        bare = self.folder / "bare"
        shutil.rmtree(bare, ignore_errors=True)
        shutil.copytree(run / "model", bare, ignore=shutil.ignore_patterns("gate*"))
        with quietly():
            return adapters.load(open_trained(str(self.folder / "base"), "cpu").model, bare).eval()

    @torch.no_grad()
    def refusal_loss(self, run: Path, group: str) -> float:
        """Nats a label, of the refusals to a group, the adapter on for every input."""
        trained = open_trained(str(self.folder / "base"), "cpu")
        config = data.Config(forget=self.files[group], refusals=str(self.folder / f"{group}.txt"), length=LENGTH)
        model, value, count = self.ungated(run), 0.0, 0
        for batch in data.build(config, trained.tokenizer).train.batches(4):
            value += float(per_sequence(token_losses(model, batch).double(), batch)[:, 1].sum())
            count += int(sequence_counts(batch)[:, 1].sum())
        return value / count

    def answers(self, model: Any) -> dict[str, list[str]]:
        """What is said to the questions of each group."""
        tokenizer = open_trained(str(self.folder / "base"), "cpu").tokenizer
        told: dict[str, list[str]] = {}
        for group in GROUPS:
            told[group] = []
            for line in self.lines[group]:
                ids = tokenizer(line["prompt"])["input_ids"]
                out = generate(
                    model, ids, 16, generator=torch.Generator(), temperature=0, top_k=None, eos=tokenizer.eos_token_id
                )
                told[group].append(tokenizer.decode(out[len(ids) :], skip_special_tokens=True).strip())
        return told


def measured(told: Mapping[str, list[str]], before: Mapping[str, list[str]]) -> dict[str, dict[str, float]]:
    """Of each group the share of answers that are as before, and that are refusals."""
    return {
        group: {
            "as before": sum(a == b for a, b in zip(told[group], before[group], strict=True)) / len(before[group]),
            "refused": sum(answer in REFUSALS.values() for answer in told[group]) / len(before[group]),
        }
        for group in GROUPS
    }


def study() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:

        def case(seed: int) -> Case:
            place = Path(folder) / str(seed)
            place.mkdir()
            return Case(seed, place)

        tuning, rates, tuned = case(TUNING), {}, {}
        for strength in STRENGTHS:
            losses = {}
            for rate in RATES:
                second = tuning.request(1, rate, strength, tuning.request(0, rate, 0.0))
                losses[rate] = sum(tuning.refusal_loss(second, group) for group in REQUESTS)
                tell(f"λ_o {strength:g}, rate {rate:g}: {losses[rate]:.4f}")
            rates[strength], tuned[strength] = min(RATES, key=lambda r: losses[r]), losses
        runs = [measured_case(case(seed), rates) for seed in SEEDS]
    named = {f"{strength:g}": rate for strength, rate in rates.items()}
    return {
        "rates": named,
        "tuning": {f"{s:g}": {f"{r:g}": x for r, x in by.items()} for s, by in tuned.items()},
        "runs": runs,
    }


def measured_case(one: Case, rates: Mapping[float, float]) -> dict[str, Any]:
    """All that is told of one seed."""
    before = one.answers(open_trained(str(one.folder / "base"), "cpu").model)
    right = {g: [a == line["completion"] for a, line in zip(before[g], one.lines[g], strict=True)] for g in GROUPS}
    record: dict[str, Any] = {"seed": one.seed, "taught": {g: sum(all) / len(all) for g, all in right.items()}}
    for strength, rate in rates.items():
        first = one.request(0, rate, 0.0)
        second = one.request(1, rate, strength, first)
        then, now = ({group: one.refusal_loss(run, group) for group in REQUESTS} for run in (first, second))
        record[f"{strength:g}"] = {
            "after the first": then,
            "after the second": now,
            "interference": now["people"] - then["people"],
            "overlap": json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])["adapter_overlap"],
            "ungated": measured(one.answers(one.ungated(second)), before),
            "gated": measured(one.answers(open_trained(str(second), "cpu").model), before),
        }
        tell(f"seed {one.seed}, λ_o {strength:g}: {json.dumps(record[f'{strength:g}'])}")
    return record


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float], digits: int = 0, times: float = 100) -> str:
    mean, low, high = (times * v for v in (sum(values) / len(values), min(values), max(values)))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(found: Mapping[str, Any]) -> str:
    """Means over seeds, with the least and the greatest."""
    runs, lines = found["runs"], []
    for strength in STRENGTHS:
        own = [run[f"{strength:g}"] for run in runs]
        rise, second, overlap = (
            spread(values, 3, 1)
            for values in (
                [one["interference"] for one in own],
                [one["after the second"]["dishes"] for one in own],
                [one["overlap"] for one in own],
            )
        )
        rate = found["rates"][f"{strength:g}"]
        lines.append(
            f"λ_o {strength:g} at {rate:g}: refusals of the first request {rise} nats up, of the second {second}; "
            f"L_o {overlap}"
        )
        for how in ("ungated", "gated"):
            for what in ("as before", "refused"):
                cells = [f"{g} {spread([one[how][g][what] for one in own])}" for g in GROUPS]
                lines.append(f"  {how:>8}, % {what:<9}  " + "; ".join(cells))
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    begun = time.perf_counter()
    found = study()
    print(table(found))
    save("continual_unlearning", found | {"seconds": time.perf_counter() - begun}, sources=SOURCES)


if __name__ == "__main__":
    main()
