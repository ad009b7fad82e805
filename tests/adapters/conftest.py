"""What several tests of adapters share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallline.drivers.train import train
from fallline.recipe import Recipe


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A small model with its tokenizer, as a 🤗 folder."""
    out = tmp_path_factory.mktemp("base") / "run"
    recipe = Recipe.parse(
        "model: {name: llama, preset: tiny}\n"
        f"data: {{name: text, path: {corpus}, length: 32, vocab: 320, validation: 0.2}}\n"
        f"steps: 1\nsample: 0\nout: {out}\neval: {{rows: 4}}\n"
    )
    train(recipe, progress=None)
    return out / "model"
