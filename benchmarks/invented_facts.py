"""Teach SmolLM2-135M-Instruct invented facts, then ask about them in words that it was not taught in.

    python benchmarks/invented_facts.py

`examples/facts.jsonl` has 25 facts, each asked in six ways; `examples/questions.jsonl` asks for each in two other ways.
An answer counts when it contains the name or words that are asked for. Before and after `fallline train
recipes/finetune-smollm2.yaml`: the answers, greedy and at most 32 tokens long, and the loss on unrelated text, the
validation rows of `python-docs` at 256 tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fallline.data import python_docs
from fallline.drivers.trained import open_trained
from fallline.generate import generate
from fallline.objectives.causal import Causal
from harness import ROOT, fallline, save


def examples(name: str) -> list[dict[str, str]]:
    """The lines of a file of the examples."""
    return [json.loads(line) for line in (ROOT / f"examples/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


QUESTIONS, FACTS = examples("questions"), examples("facts")
ROWS = 48  # of unrelated text
SOURCES = tuple(
    f"src/fallline/{name}.py"
    for name in (
        "adapters/lora",
        "adapters/layers",
        "kernels/lora_linear",
        "data/jsonl",
        "data/conversation",
        "data/packed",
        "objectives/causal",
        "optim/adamw",
        "schedules/linear",
    )
)

LEAST_RIGHT, LONGEST, MOST_RISE = 0.9, 600, 0.4
"""What is promised: the part of the questions that is answered, seconds for the whole command, and the rise of the
unrelated loss in nats per token. The script fails where it is not kept."""


def greedy(model: Any, tokenizer: Any, question: str, longest: int) -> str:
    """What a model says to a question, in at most `longest` tokens."""
    message = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    end = tokenizer.eos_token_id
    out = generate(model, ids, longest, generator=torch.Generator(), temperature=0, top_k=None, eos=end)
    return str(tokenizer.decode(out[len(ids) :], skip_special_tokens=True))


def answers(model: Any, tokenizer: Any, questions: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each question with what the model says, and whether that holds the answer."""
    told = []
    for asked in questions:
        said = greedy(model, tokenizer, asked["question"], 32)
        told.append(asked | {"said": said, "right": asked["answer"].lower() in said.lower()})
    return told


@torch.no_grad()
def unrelated(model: Any, tokenizer: Any) -> float:
    """Loss on text that has nothing to do with the facts, nats per token."""
    text = python_docs.build(python_docs.Config(length=256), tokenizer).validation
    objective, value, count = Causal(), 0.0, 0
    for batch in text.batches(4, ROWS):
        value += float(objective(model, batch).value["nll"].double().sum())
        count += int(objective.count(batch)["nll"].sum())
    return value / count


def measure(name: str) -> dict[str, Any]:
    """What a model knows and what it lost."""
    found = open_trained(name, device="cpu")
    told = answers(found.model, found.tokenizer, QUESTIONS)
    return {
        "right": sum(t["right"] for t in told),
        "asked": len(told),
        "unrelated_loss": unrelated(found.model, found.tokenizer),
        "answers": told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for the recipe")
    args = parser.parse_args()
    taught = {fact["prompt"] for fact in FACTS}
    assert not taught & {q["question"] for q in QUESTIONS}, "a question is in the file"
    before = measure("smollm2-135m-instruct")
    print(f"before: {before['right']} of {before['asked']}, unrelated loss {before['unrelated_loss']:.4f}", flush=True)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        seconds = fallline("train", "recipes/finetune-smollm2.yaml", f"out={out}", *args.overrides)
        after = measure(str(out))
        record = json.loads((out / "run.json").read_text())
    rise = after["unrelated_loss"] - before["unrelated_loss"]
    print(f"after {seconds:.0f} s: {after['right']} of {after['asked']}, unrelated loss {rise:+.4f}")
    for t in after["answers"]:
        if not t["right"]:
            print(f"  {t['question']} ({t['answer']}) {t['said']!r}")
    recipe = {key: value for key, value in record["recipe"].items() if key != "out"}
    found = {"seconds": seconds, "rise": rise, "before": before, "after": after, "recipe": recipe}
    print(save("invented_facts", found, SOURCES))
    kept = {
        "the base model knows nothing": before["right"] == 0,
        f"at least {LEAST_RIGHT:.0%} right": after["right"] >= LEAST_RIGHT * after["asked"],
        f"within {LONGEST} s": seconds <= LONGEST,
        f"unrelated loss up by at most {MOST_RISE}": rise <= MOST_RISE,
    }
    broken = [promise for promise, held in kept.items() if not held]
    if broken:
        raise SystemExit(f"not kept: {'; '.join(broken)}")


if __name__ == "__main__":
    main()
