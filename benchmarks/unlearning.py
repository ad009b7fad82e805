"""Unlearning invented people: what is forgotten against what is kept, beside a model that never knew them.

    python benchmarks/unlearning.py
    python benchmarks/unlearning.py smollm2

People, three facts each, in three groups of equal size: to forget, shown as what to keep, and never seen by unlearning.
A model learns all facts by heart, and to say that it does not know of as many other people; another, the only true
target, learns the same without the first group. Each objective then starts from the first model: AdamW, equal rows of
each stream, no decay of the rate. After every few steps each group is asked: the share of answers that greedy decoding
gets right to the last token, and the mean −log p of a label.

A run is judged at its first evaluation with no more right answers to forget than the retrained model gives, plus 5
points; at its last, if there is none. The rate of each objective is the one that keeps the most right answers of the
unseen group there, on one seed; those that forget come before those that do not. Judged on others: means with the least
and the greatest.

The first is a Llama of 1 M parameters, 15 people in a group, all weights trained: some ten minutes. The second is
SmolLM2-135M-Instruct, 8 people in a group, a LoRA to teach, merged, and another to forget: some forty. Single thread.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fallline.adapters import attach, disabled, merge, remove
from fallline.adapters.layers import adapted
from fallline.catalog import find
from fallline.contracts import Batch
from fallline.data import jsonl, uniform, unlearning
from fallline.isolation import isolated
from fallline.models import llama
from fallline.models import smollm2_135m_instruct as smollm2
from fallline.models.identity import fingerprint
from fallline.noise import rng
from fallline.optim import create
from fallline.reference import Reference
from fallline.step import Run, take_step
from fallline.tokens import IGNORED
from harness import save

TUNING, LENGTH, SLACK = 100, 128, 0.05


@dataclass(frozen=True)
class Size:
    """What differs between the models.

    Attributes:
        group: people in a group. vocab: of the tokenizer that is trained, if none comes with the model.
        teaching, forgetting, every: steps of both, and between two evaluations.
        rows: rows in a step to teach; half as many of each stream to forget.
        rate: to teach with. rates: to choose from.
    """

    group: int
    vocab: int | None
    teaching: int
    forgetting: int
    every: int
    rows: int
    rate: float
    rates: tuple[float, ...]
    seeds: range
    result: str


TINY = Size(15, 400, 240, 40, 4, 4, 3e-3, (3e-5, 1e-4, 3e-4, 1e-3), range(3), "unlearning")
SMOLLM2 = Size(8, None, 100, 20, 4, 2, 2e-3, (3e-4, 1e-3, 3e-3), range(2), "unlearning_smollm2")
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "ga": ("ga", {}),
    "graddiff": ("graddiff", {}),
    "kl-retain": ("kl-retain", {}),
    "npo": ("npo", {}),
    "simnpo": ("simnpo", {}),
    "idk": ("idk", {}),
    "flat": ("flat", {}),
}
GROUPS = ("forget", "retain", "unseen")
REFUSALS = ("I do not know.", "Nobody has told me.", "That I cannot say.")
TOWNS = ["Karsk", "Omwel", "Tirane", "Bresk", "Halden", "Quorn", "Velmo", "Istra", "Pellow", "Dunmar"]
TRADES = ["baker", "smith", "tailor", "pilot", "miller", "painter", "grocer", "lawyer", "sailor", "printer"]
SOUNDS = ["ba", "ko", "mi", "ru", "ta", "le", "so", "ni", "va", "du", "pe", "gi"]
SOURCES = (
    "src/fallline/objectives/forgetting.py",
    "src/fallline/objectives/divergence.py",
    *(f"src/fallline/objectives/{id.replace('-', '_')}.py" for id in CHOICES),
    "src/fallline/data/unlearning.py",
    "src/fallline/data/streams.py",
    "src/fallline/data/uniform.py",
    "benchmarks/unlearning.py",
)

Lines = list[dict[str, str]]


def people(seed: int, size: int) -> dict[str, Lines]:
    """Questions and answers about each group, and about people of whom nothing is known."""
    g = rng(seed, 0, "people")
    names: list[str] = []
    while len(names) < 4 * size:
        parts = [SOUNDS[int(i)] for i in torch.randint(len(SOUNDS), (5,), generator=g)]
        name = f"{''.join(parts[:2]).title()} {''.join(parts[2:]).title()}"
        names += [] if name in names else [name]
    found: dict[str, Lines] = {}
    for i, group in enumerate((*GROUPS, "unknown")):
        found[group] = []
        for name in names[i * size : (i + 1) * size]:
            town, trade, year, *refusal = torch.randint(10, (6,), generator=g).tolist()
            told = (TOWNS[town], TRADES[trade], str(1900 + 7 * year))
            asked = (f"Where does {name} live?", f"What does {name} do?", f"When was {name} born?")
            if group == "unknown":
                told = tuple(REFUSALS[r % len(REFUSALS)] for r in refusal)
            found[group] += [{"prompt": f"{q} ", "completion": a} for q, a in zip(asked, told, strict=True)]
    return found


def written(folder: Path, name: str, *lines: Lines) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(line) for group in lines for line in group), encoding="utf-8")
    return str(path)


def read(path: str, tokenizer: Any = None, vocab: int | None = None) -> Any:
    """All lines of a file, as `jsonl` gives them; the held-out ones too."""
    apart = str(Path(path).with_suffix(".apart.jsonl"))
    Path(apart).write_text(Path(path).read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    options: dict[str, Any] = {"path": path, "validation_path": apart, "length": LENGTH, "chat": False}
    return jsonl.build(jsonl.Config(**options | ({} if vocab is None else {"vocab": vocab})), tokenizer)


def steps(
    model: nn.Module, id: str, options: Mapping[str, Any], source: Any, rate: float, rows: int, seed: int,
    *, optimizer: str = "adamw", estimator: str = "backprop",
) -> Run:  # fmt: skip
    """A run that has not begun."""
    module, how = find("objective", id).load(), find("estimator", estimator).load()
    objective = module.build(module.Config(**options))
    reference = None
    if getattr(objective, "reference", False):
        content = fingerprint(model)
        reference = Reference(model, content, disabled if adapted(model) else None)
    trained = nn.ModuleDict({"model": model, "objective": objective}) if list(objective.parameters()) else model
    rule = create(optimizer, trained, lr=rate)
    return Run(
        model=model,
        objective=objective,
        source=source,
        sampler=uniform.build(uniform.Config(), source, rows=rows, seed=seed),
        estimator=how.build(how.Config()),
        optimizer=rule,
        schedule=torch.optim.lr_scheduler.ConstantLR(rule, factor=1.0),
        micro=rows,
        seed=seed,
        reference=reference,
    )


def taught(size: Size, seed: int, dataset: Any) -> Any:
    build, config = (llama.build, llama.Config(preset="tiny")) if size is TINY else (smollm2.build, smollm2.Config())
    model = build(
        config, tokenizer=dataset.tokenizer, length=LENGTH, seed=seed, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    if size is SMOLLM2:
        attach(model, "lora", rank=32, seed=seed)
    run = steps(model, "causal", {}, dataset.train, size.rate, size.rows, seed)
    while run.step < size.teaching:
        take_step(run)
    if size is SMOLLM2:
        merge(model)
        remove(model)
    return model


@torch.no_grad()
def answers(model: Any, batches: Mapping[str, Batch]) -> dict[str, dict[str, float]]:
    """Of each group: the share of answers that greedy decoding gives, and the mean −log p of a label."""
    found = {}
    for group, batch in batches.items():
        logits: Tensor = model(**isolated(model, batch)).logits
        labels = batch["labels"]
        asked = labels != IGNORED
        nll = nn.functional.cross_entropy(logits[asked], labels[asked])
        wrong = (logits.argmax(-1) != labels) & asked
        missed = torch.zeros(len(batch["example_id"]), dtype=torch.bool)
        missed[batch["segment"][wrong]] = True
        found[group] = {"right": 1 - missed.double().mean().item(), "nll": nll.item()}
    return found


class Case:
    """The models and data of one seed."""

    def __init__(self, size: Size, seed: int, folder: Path) -> None:
        self.size, self.seed, lines = size, seed, people(seed, size.group)
        tokenizer = smollm2.tokenizer(smollm2.Config()) if size is SMOLLM2 else None
        files = {group: written(folder, group, lines[group]) for group in GROUPS}
        everything = read(written(folder, "all", *lines.values()), tokenizer, size.vocab)
        tokenizer = everything.tokenizer
        rest = read(written(folder, "rest", *(v for k, v in lines.items() if k != "forget")), tokenizer)
        (folder / "refusals.txt").write_text("\n".join(REFUSALS), encoding="utf-8")
        self.data = unlearning.build(
            unlearning.Config(
                forget=files["forget"],
                retain=files["retain"],
                refusals=str(folder / "refusals.txt"),
                length=LENGTH,
                chat=False,
            ),
            tokenizer,
        ).train
        self.batches: dict[str, Batch] = {}
        for group, path in files.items():
            source = read(path, tokenizer).train
            (self.batches[group],) = source.batches(len(source.rows) - 1)
        self.model, self.retrained = (taught(size, seed, known) for known in (everything, rest))
        self.begin, self.target = (answers(model, self.batches) for model in (self.model, self.retrained))

    def said(self) -> str:
        return f"taught {shown(self.begin)}; retrained {shown(self.target)}"

    def forget(self, choice: str, rate: float) -> dict[str, Any]:
        """What each evaluation found, and at which the run is judged."""
        id, options = CHOICES[choice]
        model = copy.deepcopy(self.model).train()
        if self.size is SMOLLM2:
            attach(model, "lora", rank=16, seed=self.seed)
        run = steps(model, id, options, self.data, rate, self.size.rows, self.seed)
        curve = []
        while run.step < self.size.forgetting:
            take_step(run)
            if run.step % self.size.every == 0:
                curve.append({"step": run.step} | answers(run.model, self.batches))
        enough = self.target["forget"]["right"] + SLACK
        done = [point for point in curve if point["forget"]["right"] <= enough]
        return {"curve": curve, "judged": (done or curve[-1:])[0], "forgotten": bool(done)}


def judged(
    choices: Iterable[str], rates: Sequence[float], seeds: Iterable[int], make: Callable[[int, Path], Any]
) -> tuple[dict[str, Any], list[Any]]:
    """Rates that are chosen on one seed, and the runs with them on others; and the cases of those.

    Args:
        make: the case of a seed, in an empty folder; it has `forget` and `said`.
    """
    with tempfile.TemporaryDirectory() as folder:

        def case(seed: int) -> Any:
            place = Path(folder) / str(seed)
            place.mkdir()
            found = make(seed, place)
            tell(f"seed {seed}: {found.said()}")
            return found

        tuning, best, tuned = case(TUNING), {}, {}
        for choice in choices:
            tuned[choice] = {rate: tuning.forget(choice, rate) for rate in rates}
            best[choice] = max(rates, key=lambda rate: worth(tuned[choice][rate]))
            tell(f"{choice}: {best[choice]:g}, {shown(tuned[choice][best[choice]]['judged'])}")
        cases = [case(seed) for seed in seeds]
        runs = {choice: [one.forget(choice, rate) for one in cases] for choice, rate in best.items()}
    table = {c: {f"{rate:g}": found["judged"] for rate, found in by.items()} for c, by in tuned.items()}
    return {"rates": best, "tuning": table, "runs": runs}, cases


def study(size: Size) -> dict[str, Any]:
    found, cases = judged(CHOICES, size.rates, size.seeds, lambda seed, folder: Case(size, seed, folder))
    return found | {"taught": [one.begin for one in cases], "retrained": [one.target for one in cases]}


def worth(found: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Those that forget before those that do not; then what else is kept."""
    judged = found["judged"]
    kept = judged["unseen"]["right"] if found["forgotten"] else -judged["forget"]["right"]
    return found["forgotten"], kept, -judged["unseen"]["nll"]


def shown(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{g} {100 * point[g]['right']:.0f} % ({point[g]['nll']:.2f})" for g in GROUPS)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(found: Mapping[str, Any]) -> str:
    """Means over seeds, with the least and the greatest."""

    def row(name: str, points: list[Any], more: str) -> str:
        cells = []
        for group in GROUPS:
            right = [100 * p[group]["right"] for p in points]
            nll = sum(p[group]["nll"] for p in points) / len(points)
            cells.append(f"{sum(right) / len(right):4.0f} % [{min(right):.0f}, {max(right):.0f}] {nll:6.2f}")
        return f"{name:>10}  " + "  ".join(f"{cell:>24}" for cell in cells) + f"  {more}"

    lines = [f"{'':>10}  " + "  ".join(f"{group:>24}" for group in GROUPS) + "  rate, steps"]
    lines += [row("taught", found["taught"], ""), row("retrained", found["retrained"], "")]
    for choice, runs in found["runs"].items():
        steps = ", ".join(str(run["judged"]["step"]) if run["forgotten"] else "never" for run in runs)
        lines.append(row(choice, [run["judged"] for run in runs], f"{found['rates'][choice]:g}, {steps}"))
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    size = SMOLLM2 if sys.argv[1:] == ["smollm2"] else TINY
    begun = time.perf_counter()
    found = study(size)
    print(table(found))
    save(size.result, found | {"seconds": time.perf_counter() - begun}, sources=SOURCES)


if __name__ == "__main__":
    main()
