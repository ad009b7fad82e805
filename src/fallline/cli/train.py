"""`fallline train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..recipe import Recipe


def train(path: str, overrides: Sequence[str], resume: bool, print_recipe: bool, quiet: bool, force: bool) -> int:
    """Load the recipe, train, and say what came of it."""
    recipe = Recipe.load(path, *overrides)
    if print_recipe:
        print(recipe.to_yaml(), end="")
        return 0
    from ..drivers.train import train as run

    result = run(recipe, resume=resume, force=force, progress=None if quiet else sys.stderr)
    if result.signal is not None:
        print(
            f"interrupted and saved after step {result.run.step}; continue with: fallline train {result.out} --resume"
        )
        return 128 + result.signal
    print(f"validation loss {result.validation_loss:.4f} after {result.run.step} steps")
    if result.run.stopped:
        print(f"stopped early: {result.run.stopped}")
    if result.sample:
        print(f"the model writes: {result.sample!r}")
    what = "the adapter, for PEFT" if result.run.given else "the model, for AutoModelForCausalLM"
    print(f"run folder {result.out}  ({what}: {result.out / 'model'})")
    return 0
