"""No adapter: every parameter of the model is trained.

It is what a recipe without the key `adapter` means, and what adapters are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..catalog import Card
from ..options import Options

CARD = Card(
    id="none",
    kind="adapter",
    summary="No adapter: every parameter of the model is trained (full fine-tuning, or training from scratch).",
    equation="W ← W − update",
    checked="the model is left as it is",
    tags=("full fine-tuning",),
)


@dataclass(frozen=True)
class Config(Options):
    """No options."""


def build(config: Config) -> None:
    return None
