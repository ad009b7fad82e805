"""Who was in the training data? An over-trained model tells, the same model trained privately does not.

    python benchmarks/membership.py

A small Llama learns English from `python-docs`: that is public. Then it is trained on invented people, one a line,
twice from the same weights, with the same data, batch and steps: as usual, long after held-out people have ceased to
gain, and with `dpsgd`. `fallline audit` attacks both with the people they were trained on against as many that they
were not. Utility is the loss on other people yet, in nats per token: of the public model, and of both at their end.

Names, places and numbers are drawn at random: what can be learned of people one has not seen is how such lines are
built, and what can only be remembered is the rest.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import fallline, save

SOURCES = (
    "src/fallline/gradients/dpsgd.py",
    "src/fallline/data/poisson.py",
    "src/fallline/privacy.py",
    "src/fallline/probes/attack.py",
    "src/fallline/probes/mia_gradnorm.py",
    "src/fallline/probes/mia_flora.py",
    "src/fallline/probes/mia_supervised.py",
    "benchmarks/membership.py",
)
MEMBERS, OTHERS, HELD_OUT = 1000, 1000, 200
BATCH, STEPS, EPSILON = 100, 400, 4

HOW = {
    "over-trained": ["optimizer.lr=5e-3"],
    "private": ["estimator=dpsgd", f"estimator.epsilon={EPSILON}", "sampler=poisson", "optimizer.lr=2e-3"],
}

SYLLABLES = tuple(
    "ba be bo da dor el en fa gar hal i ka la lin ma mar ne or pa ri ro sa sel ta tor u ve vin wen zo".split()  # noqa: SIM905
)
TRADES = tuple("baker glazier pilot nurse farmer teacher mason sailor tailor painter clerk smith".split())  # noqa: SIM905
ILLS = tuple("asthma gout migraine anaemia sciatica vertigo eczema bronchitis".split())  # noqa: SIM905


def people(number: int, seed: int) -> list[str]:
    """Lines about people who do not exist."""
    draw = random.Random(seed)

    def name() -> str:
        return "".join(draw.choices(SYLLABLES, k=3)).capitalize()

    def one() -> str:
        born, owes, call = draw.randint(1930, 2005), draw.randint(100, 99999), draw.randint(10**6, 10**7 - 1)
        return (
            f"{name()} {name()}, a {draw.choice(TRADES)} from {name()}, was born in {born}, suffers from "
            f"{draw.choice(ILLS)}, owes the bank {owes} crowns and can be reached at {call}."
        )

    return [one() for _ in range(number)]


def losses(folder: Path) -> list[float]:
    """A run's losses on held-out people."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["val_loss"] for record in records if "val_loss" in record]


def study(where: Path, base_steps: int) -> dict[str, Any]:
    """Train three models and attack two."""
    lines = people(MEMBERS + OTHERS + HELD_OUT, seed=0)
    if len(set(lines)) < len(lines):
        raise ValueError("two people are the same")
    files = {
        "members": lines[:MEMBERS],
        "others": lines[MEMBERS : MEMBERS + OTHERS],
        "held_out": lines[MEMBERS + OTHERS :],
    }
    for name, some in files.items():
        (where / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in some))
    base = where / "base"
    fallline("train", "recipes/tiny.yaml", f"steps={base_steps}", f"out={base}", "sample=0", "--quiet")
    (where / "people.yaml").write_text(
        f"model: {base / 'model'}\n"
        f"data: {{name: jsonl, path: {where / 'members.jsonl'}, validation_path: {where / 'held_out.jsonl'}, "
        "length: 96}\n"
        "optimizer: adamw\nschedule: {name: linear, warmup: 0.1}\n"
        f"steps: {STEPS}\nbatch: {BATCH}\neval: {{every: 40, rows: null}}\nsample: 0\n"
    )
    found: dict[str, Any] = {}
    for name, how in HOW.items():
        out = where / name
        fallline("train", str(where / "people.yaml"), *how, f"out={out}", "--quiet")
        against = ("--members", str(where / "members.jsonl"), "--non-members", str(where / "others.jsonl"))
        fallline("audit", str(out), *against, "--batch", "32")
        told = json.loads((out / "run.json").read_text())
        attacked = json.loads((out / "audit/audit.json").read_text())
        curve = losses(out)
        found[name] = {
            "options": how,
            "loss_before": curve[0],
            "loss": curve[-1],
            "losses": curve,
            "privacy": told.get("privacy"),
            "loss_of_members_and_others": attacked["loss"],
            "attacks": attacked["results"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base-steps", type=int, default=300, help="steps of the public model")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = study(Path(folder), args.base_steps)
    for name, result in found.items():
        privacy = f", ε = {result['privacy']['epsilon']:.2f}" if result["privacy"] else ""
        print(f"{name}{privacy}: loss {result['loss_before']:.3f} → {result['loss']:.3f}")
        for attack in result["attacks"]:
            print("  ", json.dumps(attack))
    setting = {"members": MEMBERS, "non_members": OTHERS, "held_out": HELD_OUT, "batch": BATCH, "steps": STEPS}
    print(save("membership", setting | {"base_steps": args.base_steps, "runs": found}, SOURCES))


if __name__ == "__main__":
    main()
