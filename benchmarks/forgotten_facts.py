"""Make a model forget five of 25 facts that it was taught, with the recipe of the README.

    python benchmarks/forgotten_facts.py                # teaches first
    python benchmarks/forgotten_facts.py --taught RUN   # a finished run of recipes/finetune-smollm2.yaml

`examples/forget.jsonl` and `examples/retain.jsonl` share out the lines of `examples/facts.jsonl`: five facts to forget,
twenty to keep. Asked are the questions of `examples/questions.jsonl`, put in other words, greedy; an answer is right
when it holds what was asked for. Twice as the recipe says, by two seeds; once with every second of the twenty facts
shown as what to keep.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fallline.drivers.trained import open_trained
from harness import fallline, save
from invented_facts import QUESTIONS, answers, examples, unrelated

SOURCES = tuple(
    f"src/fallline/{name}.py"
    for name in ("adapters/lora", "data/unlearning", "objectives/npo", "objectives/forgetting")
)


def about(facts: list[dict[str, str]]) -> list[dict[str, str]]:
    """The questions about them."""
    told = "\n".join(fact["completion"] for fact in facts)
    return [question for question in QUESTIONS if question["answer"] in told]


FORGET, RETAIN = examples("forget"), examples("retain")
SHOWN = [*dict.fromkeys(fact["completion"] for fact in RETAIN)][::2]
HALF = [fact for fact in RETAIN if fact["completion"] in SHOWN]
ASKED = {
    "forget": about(FORGET),
    "keep, one half": about(HALF),
    "keep, other half": about([fact for fact in RETAIN if fact not in HALF]),
}


def measure(name: str) -> dict[str, Any]:
    """What a model still knows, and its loss on unrelated text."""
    found = open_trained(name, device="cpu")
    told = {part: answers(found.model, found.tokenizer, questions) for part, questions in ASKED.items()}
    right = {part: [sum(t["right"] for t in said), len(said)] for part, said in told.items()}
    return {"right": right, "unrelated_loss": unrelated(found.model, found.tokenizer), "answers": told}


def line(name: str, found: dict[str, Any]) -> str:
    shares = ", ".join(f"{part}: {right} of {asked}" for part, (right, asked) in found["right"].items())
    return f"{name}: right of {shares}; unrelated loss {found['unrelated_loss']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--taught", help="a finished run of recipes/finetune-smollm2.yaml")
    args = parser.parse_args()
    assert sum(map(len, ASKED.values())) == len(QUESTIONS), "a question is about two facts, or none"

    with TemporaryDirectory() as name:
        folder = Path(name)
        taught, merged = args.taught or str(folder / "run"), str(folder / "taught")
        if args.taught is None:
            fallline("train", "recipes/finetune-smollm2.yaml", f"out={taught}")
        fallline("export", taught, "--merge", merged)
        found = {"taught": measure(merged)}
        print(line("taught", found["taught"]), flush=True)
        half = folder / "half.jsonl"
        half.write_text("".join(json.dumps(fact) + "\n" for fact in HALF), encoding="utf-8")
        choices = {"all shown": (), "all shown, seed 1": ("seed=1",), "one half shown": (f"data.retain={half}",)}
        for choice, overrides in choices.items():
            out = str(folder / f"run-{len(found)}")
            seconds = fallline("train", "recipes/unlearn.yaml", f"model={merged}", f"out={out}", *overrides)
            found[choice] = measure(out) | {"seconds": seconds}
            print(line(f"{choice}, after {seconds:.0f} s", found[choice]), flush=True)
            for t in found[choice]["answers"]["forget"]:
                print(f"  {t['question']} {t['said']!r}")
    print(save("forgotten_facts", found, SOURCES))


if __name__ == "__main__":
    main()
