"""Is the memory that `fallline plan` forecasts the memory that runs take?

    python benchmarks/memory_forecast.py [--only development]

`NUMBER` settings are drawn at random from models × optimizers × adapters × rows × lengths × checkpointing × precision.
Each is trained for three steps in a process of its own; measured is its highest resident size above what it had once
the parts were built and a small model had been through a step, so that code and libraries do not count. The forecast is
that of `fallline.drivers.plan`, without the weights, which are there by then.

Measured with the allocator giving freed blocks back at once, as `fallline train` has it where memory is scarce; every
fourth setting also as it is otherwise, when the gaps that it leaves count too.

Every second setting was held back: the formulas were written without looking at it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from fallline.catalog import entries
from fallline.drivers.allocator import thrift
from fallline.drivers.compare.meter import forget_peak
from fallline.drivers.plan import forecast, setup_of
from fallline.drivers.setting import build
from fallline.metrics import peak_memory, resident_memory
from fallline.recipe import Recipe
from fallline.step import take_step
from harness import ROOT, save

NUMBER = 48
WORK = 5e11  # operations of a step
SOURCES = [
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src/fallline/drivers/plan").glob("*.py")),
    "src/fallline/footprint.py",
    "benchmarks/memory_forecast.py",
]

MODELS = {"tiny": 1.8e6, "small": 10e6, "60m": 33e6, "130m": 100e6, "gpt2": 14e6, "qwen2": 9e6}
"""Name → parameters, about, with 4096 words."""


def settings() -> list[dict[str, Any]]:
    """What is measured."""
    draw = random.Random(1)
    optimizers = sorted(id for kind, id in entries() if kind == "optimizer" and id != "lanton")
    found: list[dict[str, Any]] = []
    while len(found) < NUMBER:
        one = {
            "model": draw.choice(list(MODELS)),
            "optimizer": optimizers[len(found) % len(optimizers)],
            "adapter": draw.choice(("none", "none", "lora")),
            "rows": draw.choice((1, 2, 4, 8)),
            "several": draw.random() < 0.25,
            "length": draw.choice((64, 128, 256, 512, 1024)),
            "checkpointing": draw.random() < 0.4,
            "precision": "bfloat16" if draw.random() < 0.1 else "float32",
        }
        slow = 20 if one["precision"] == "bfloat16" else 1  # its products are, on most processors
        if slow * 8 * MODELS[one["model"]] * one["rows"] * one["length"] * (1 + one["several"]) < WORK:
            found.append(one)
    return found


def recipe(one: dict[str, Any], folder: Path) -> Recipe:
    """A setting as a recipe."""
    own = one["model"] in ("gpt2", "qwen2")
    name = f"{{name: pretrained, path: {folder / one['model']}" if own else f"{{name: llama, preset: {one['model']}"
    words = "" if own else ", vocab: 4096"
    return Recipe.parse(
        f"model: {name}, checkpointing: {json.dumps(one['checkpointing'])}}}\n"
        f"adapter: {one['adapter']}\noptimizer: {one['optimizer']}\n"
        f"data: {{name: python-docs, length: {one['length']}{words}}}\nschedule: constant\nsteps: 3\n"
        f"batch: {one['rows'] * (1 + one['several'])}\nmicro: {one['rows']}\nprecision: {one['precision']}\n"
    )


def models(folder: Path) -> None:
    """Two models of 🤗 Transformers that are no Llama, with random weights."""
    words = build(recipe(settings()[0] | {"model": "tiny"}, folder)).dataset.tokenizer
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "vocab_size": len(words)}
    for name, model in {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=384, n_layer=6, n_head=6, **ids)),
        "qwen2": Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
                num_key_value_heads=2, tie_word_embeddings=True, **ids,
            )
        ),
    }.items():  # fmt: skip
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def measure(one: dict[str, Any], folder: Path, thrifty: bool) -> dict[str, float]:
    """In this process: bytes above what it has once the parts are there, and the forecast of them."""
    if thrifty:
        thrift()
    warm = build(recipe(one | {"model": "tiny", "rows": 1, "length": 64}, folder)).run
    for _ in range(2):
        take_step(warm)
    del warm
    asked = recipe(one, folder)
    run = build(asked).run
    told = forecast(setup_of(asked, run.model.config, "cpu"))
    forget_peak()
    base = resident_memory()
    for _ in range(3):
        take_step(run)
    return {
        "measured": peak_memory() - base,
        "forecast": told.peak - told.weights,
        "weights": told.weights,
        "height": told.height,
        "activations": told.activations,
        "state": told.optimizer,
    }


def apart(one: dict[str, Any], folder: str, thrifty: bool) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps([one, folder, thrifty])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{one}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("development", "held-back"), help="half of the settings; nothing is written")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one, folder, thrifty = json.loads(args.one)
        print(json.dumps(measure(one, Path(folder), thrifty)))
        return
    found = []
    with TemporaryDirectory() as where:
        models(Path(where))
        for number, one in enumerate(settings()):
            part = ("development", "held-back")[number % 2]
            if args.only not in (None, part):
                continue
            told = apart(one, where, True)
            if args.only is None and number % 4 == 0:
                told["measured_with_gaps"] = apart(one, where, False)["measured"]
            error = told["forecast"] / told["measured"] - 1
            found.append({"part": part, **one, **told, "error": error})
            print(
                f"{part:12} {one['model']:6} {one['optimizer']:12} {one['adapter']:5} {one['rows']} × "
                f"{one['length']:4}{' twice' if one['several'] else '':6}{' ckpt' if one['checkpointing'] else '':5} "
                f"{one['precision']:9} measured {told['measured'] / 2**20:7.1f} MiB  forecast "
                f"{told['forecast'] / 2**20:7.1f}  {100 * error:+.1f} %  ({told['height']})",
                flush=True,
            )
    for part in ("development", "held-back"):
        errors = [abs(one["error"]) for one in found if one["part"] == part]
        if errors:
            within = sum(error <= 0.1 for error in errors) / len(errors)
            print(f"{part}: {len(errors)} runs, {100 * within:.0f} % within 10 %, worst {100 * max(errors):.1f} %")
    if args.only is None:
        print(save("memory_forecast", {"runs": found}, SOURCES))


if __name__ == "__main__":
    main()
