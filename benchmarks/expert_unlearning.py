"""Unlearning in one expert of a mixture against the same losses on all weights: one topic forgotten, another kept.

    python benchmarks/expert_unlearning.py

15 invented people, to be forgotten; 30 invented things, half of them shown as what to keep, half never seen by
unlearning; three facts each. A mixture of three layers and four experts, of which a token takes one, learns all of them
by heart, with the usual loss that balances experts. Then `ga`, `graddiff` and `npo`, by themselves and inside `uoe`
with its defaults: 40 steps of AdamW, two rows of each stream, no decay of the rate. After every second step each group
is asked: the share of answers that greedy decoding gets right to the last token, and the mean −log p of a label; and
how many tokens to forget still go to the expert that had most of them.

A run is judged at its first evaluation with at most one in ten right answers to forget, which is chance; at its last,
if there is none. The rate of each choice is the one of seven that keeps the most right answers of the unseen group
there, on one seed; those that forget come before those that do not. Judged on three others: means with the least and
the greatest. Single thread; some five minutes.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from fallline.data import unlearning
from fallline.experts import mixtures, overheard
from fallline.isolation import isolated
from fallline.noise import rng
from fallline.objectives.forgetting import Forgetting
from fallline.objectives.uoe import attribution, told_tokens
from fallline.step import Run, take_step
from fallline.tokens import IGNORED
from harness import save
from unlearning import (
    GROUPS,
    LENGTH,
    SOUNDS,
    TINY,
    Lines,
    answers,
    judged,
    people,
    read,
    shown,
    steps,
    written,
)

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TEACHING, FORGETTING, EVERY, ENOUGH = 300, 40, 2, 0.1
EXPERTS, BALANCE = 4, 0.02
BASES = ("ga", "graddiff", "npo")
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    name: choice for id in BASES for name, choice in ((id, (id, {})), (f"uoe {id}", ("uoe", {"of": id})))
}
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "grey", "pink", "brown", "violet"]
STUFF = ["iron", "glass", "wool", "clay", "paper", "wax", "stone", "leather", "bone", "copper"]
SOURCES = (
    "src/fallline/objectives/uoe.py",
    "src/fallline/experts.py",
    "src/fallline/objectives/forgetting.py",
    *(f"src/fallline/objectives/{id}.py" for id in BASES),
    "src/fallline/data/unlearning.py",
    "src/fallline/data/streams.py",
    "src/fallline/data/uniform.py",
    "benchmarks/unlearning.py",
    "benchmarks/expert_unlearning.py",
)


def things(seed: int, number: int) -> Lines:
    """Questions and answers about things; three of each."""
    g = rng(seed, 0, "things")
    found: dict[str, Lines] = {}
    while len(found) < number:
        name = "".join(SOUNDS[int(i)] for i in torch.randint(len(SOUNDS), (3,), generator=g)) + "x"
        colour, stuff, weight = torch.randint(10, (3,), generator=g).tolist()
        found[name] = [
            {"prompt": f"The colour of a {name} is ", "completion": COLOURS[colour]},
            {"prompt": f"A {name} is made of ", "completion": STUFF[stuff]},
            {"prompt": f"A {name} weighs ", "completion": f"{3 + 7 * weight} grams"},
        ]
    return [line for lines in found.values() for line in lines]


def taught(seed: int, dataset: Any) -> Any:
    """A mixture that knows all of it."""
    torch.manual_seed(seed)
    model: Any = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(dataset.tokenizer), hidden_size=96, moe_intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, head_dim=24, num_experts=EXPERTS, num_experts_per_tok=1,
            norm_topk_prob=False, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        )
    )  # fmt: skip
    run = steps(model, "causal", {}, dataset.train, 3e-3, 4, seed)
    for step in range(TEACHING):
        draw = run.sampler.draw(step, rng(seed, step, "draw"))
        batch = run.source(draw, rng(seed, step, "noise"))
        with overheard(mixtures(model)) as told:
            logits = model(**isolated(model, batch)).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
        here = batch["segment"].flatten() >= 0
        routed = tuple(answer[0][here] for answer in told.values())
        loss = loss + BALANCE * load_balancing_loss_func(routed, EXPERTS, 1)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
    return model


class Case:
    """The model and data of one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        known = things(seed, 30)
        lines = {
            "forget": people(seed, TINY.group)["forget"],
            "retain": known[: len(known) // 2],
            "unseen": known[len(known) // 2 :],
        }
        files = {group: written(folder, group, lines[group]) for group in GROUPS}
        everything = read(written(folder, "all", *lines.values()), vocab=TINY.vocab)
        tokenizer = everything.tokenizer
        config = unlearning.Config(forget=files["forget"], retain=files["retain"], length=LENGTH)
        self.data = unlearning.build(config, tokenizer).train
        self.batches = {}
        for group, path in files.items():
            source = read(path, tokenizer).train
            (self.batches[group],) = source.batches(len(source.rows) - 1)
        self.model = taught(seed, everything)
        asked = steps(self.model, "ga", {}, self.data, 1.0, 4, seed)
        shares = attribution(asked, Forgetting(None, multiple=-1.0))
        self.layer = max(shares, key=lambda path: shares[path].max().item())
        self.expert, self.share = int(shares[self.layer].argmax()), shares[self.layer].max().item()
        self.begin = self.asked(self.model)

    def said(self) -> str:
        return f"{shown(self.begin)}; {self.layer}[{self.expert}] gets {self.begin['routed']:.2f}"

    @torch.no_grad()
    def asked(self, model: Any) -> dict[str, Any]:
        """What `answers` finds, and which part of the tokens to forget go to the expert."""
        batch = self.batches["forget"] | {"domain": torch.zeros(len(self.batches["forget"]["example_id"])).long()}
        with overheard({self.layer: mixtures(model)[self.layer]}) as told:
            model(**isolated(model, batch))
        here = told_tokens(Forgetting(None, multiple=-1.0), batch).flatten()
        sent = (told[self.layer][2] == self.expert).any(-1)[here].double().mean().item()
        return answers(model, self.batches) | {"routed": sent}

    def forget(self, choice: str, rate: float) -> dict[str, Any]:
        """What each evaluation found, and at which the run is judged."""
        id, options = CHOICES[choice]
        run: Run = steps(copy.deepcopy(self.model).train(), id, options, self.data, rate, 4, self.seed)
        run.setup()
        curve: list[dict[str, Any]] = []
        while run.step < FORGETTING:
            take_step(run)
            if run.step % EVERY == 0:
                curve.append({"step": run.step} | self.asked(run.model))
        done = [point for point in curve if point["forget"]["right"] <= ENOUGH]
        return {"curve": curve, "judged": (done or curve[-1:])[0], "forgotten": bool(done)}


def study() -> dict[str, Any]:
    found, cases = judged(CHOICES, RATES, TINY.seeds, Case)
    return found | {
        "taught": [one.begin | {"layer": one.layer, "expert": one.expert, "share": one.share} for one in cases]
    }


def table(found: dict[str, Any]) -> str:
    """Means over seeds, with the least and the greatest."""

    def cell(values: list[float]) -> str:
        low, mean, high = (100 * x for x in (min(values), sum(values) / len(values), max(values)))
        return f"{mean:4.0f} [{low:.0f}, {high:.0f}] %"

    def row(name: str, points: list[Any], more: str = "") -> str:
        cells = [cell([p[group]["right"] for p in points]) for group in GROUPS] + [cell([p["routed"] for p in points])]
        return f"{name:>12}  " + "  ".join(f"{c:>18}" for c in cells) + f"  {more}"

    lines = [f"{'':>12}  " + "  ".join(f"{c:>18}" for c in (*GROUPS, "routed")) + "  rate, steps"]
    lines.append(row("taught", found["taught"]))
    for choice, runs in found["runs"].items():
        when = ", ".join(str(run["judged"]["step"]) if run["forgotten"] else "never" for run in runs)
        lines.append(row(choice, [run["judged"] for run in runs], f"{found['rates'][choice]:g}, {when}"))
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    begun = time.perf_counter()
    found = study()
    print(table(found))
    save("expert_unlearning", found | {"seconds": time.perf_counter() - begun}, sources=SOURCES)


if __name__ == "__main__":
    main()
