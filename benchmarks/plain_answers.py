"""Teach SmolLM2-135M-Instruct to answer in a sentence, from pairs, with the recipe of the README.

    python benchmarks/plain_answers.py

`examples/pairs.jsonl` prefers a short answer to the one that the model gives of itself. Before and after
`fallline train recipes/preference.yaml`, and with another objective or rate: how many words the model takes to answer
questions that no pair asks, greedy and at most 96 tokens, and how many answers hold the word that is asked for.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fallline.drivers.trained import open_trained
from harness import fallline, save
from invented_facts import examples, greedy

CHOICES = {
    "dpo": (),
    "dpo at 1e-4": ("optimizer.lr=1e-4",),
    "orpo at 1e-4": ("objective=orpo", "optimizer.lr=1e-4"),
}
"""Each with what it changes in the recipe."""

SOURCES = tuple(
    f"src/fallline/{name}.py"
    for name in ("adapters/lora", "data/preference", "objectives/dpo", "objectives/orpo", "objectives/margin")
)
QUESTIONS = (
    ("What is the capital of Germany?", "Berlin"),
    ("How many days are in a week?", "seven|7"),
    ("What colour is the sky on a clear day?", "blue"),
    ("Who was the first president of the United States?", "Washington"),
    ("Which planet do we live on?", "Earth"),
    ("What is the chemical symbol for water?", "H2O|H₂O"),
    ("How many months are in a year?", "twelve|12"),
    ("What do cows give us to drink?", "milk"),
    ("What is the opposite of big?", "small|little"),
    ("Which animal barks?", "dog"),
    ("What is the capital of China?", "Beijing"),
    ("How many wheels does a bicycle have?", "two|2"),
    ("What do you call the place where books are lent?", "library"),
    ("Which star gives the Earth light and warmth?", "sun"),
    ("What is ten minus four?", "six|6"),
    ("What is the main language of Mexico?", "Spanish"),
    ("Which part of a plant is under the ground?", "root"),
    ("What is a baby cat called?", "kitten"),
    ("In which country is the Eiffel Tower?", "France"),
    ("How many sides does a triangle have?", "three|3"),
)
"""Each with the words of which a right answer holds one."""


def measure(name: str) -> dict[str, Any]:
    """What a model answers, in how many words, and how much of it is right."""
    found = open_trained(name, device="cpu")
    told = []
    for question, words in QUESTIONS:
        said = greedy(found.model, found.tokenizer, question, 96)
        right = any(word.lower() in said.lower() for word in words.split("|"))
        told.append({"question": question, "said": said, "right": right, "words": len(said.split())})
    words = statistics.median(t["words"] for t in told)
    return {"right": sum(t["right"] for t in told), "asked": len(told), "words": words, "answers": told}


def line(name: str, found: dict[str, Any]) -> str:
    return f"{name}: {found['words']:g} words, {found['right']} of {found['asked']} right"


def main() -> None:
    assert not {pair["prompt"] for pair in examples("pairs")} & {question for question, _ in QUESTIONS}
    found = {"before": measure("smollm2-135m-instruct")}
    print(line("before", found["before"]), flush=True)
    for name, overrides in CHOICES.items():
        with TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            seconds = fallline("train", "recipes/preference.yaml", f"out={out}", *overrides)
            lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
            found[name] = measure(str(out)) | {
                "seconds": seconds,
                "measures": [entry["measures"] | {"step": entry["step"]} for entry in lines if "measures" in entry],
            }
        print(line(f"{name}, after {seconds:.0f} s", found[name]), flush=True)
        for was, now in zip(found["before"]["answers"], found[name]["answers"], strict=True):
            print(f"  {now['question']} {was['said']!r} → {now['said']!r}")
    print(save("plain_answers", found, SOURCES))


if __name__ == "__main__":
    main()
