"""Checkpoints: the state of a run on disk, complete or not there.

    runs/mine/checkpoints/step-00000050/
        model/               a 🤗 folder: config.json, generation_config.json, model.safetensors, the tokenizer's files
        state.safetensors    every other tensor of `run.state_dict()`
        state.json           the rest of that tree, and where each tensor goes (tree.py)
        manifest.json        format, step, validation loss, size and SHA-256 of each file, and of itself

`AutoModelForCausalLM.from_pretrained` loads `model/`; its tensors have the names of `model.state_dict()`, tied ones
once. Of an adapter on a frozen model, `model/` is what the adapter is exported as (`adapter_config.json`,
`adapter_model.safetensors`, the tokenizer's files), and its parameters are in `state.safetensors`; the frozen model is
not saved. Nothing is pickled.

A checkpoint is written under a hidden name, every file and folder is synced, and one rename reveals it. Old ones are
deleted after that is durable, and hidden first. What a killed writer leaves has a hidden name too, and the next save
clears it. `save` wants the run folder to be locked; `point` marks each place where a kill could leave something behind.
"""

from __future__ import annotations

from .files import lock
from .reading import Saved, find, latest_good, load, remaining, verify
from .writing import save

__all__ = ["POINTS", "Saved", "find", "latest_good", "load", "lock", "point", "remaining", "save", "verify"]

POINTS = (
    "begin",
    "cleaned",
    "described",
    "checked",
    "tensor written",
    "model written",
    "state written",
    "manifest written",
    "synced",
    "renamed",
    "durable",
    "pruning",
    "pruned",
)
"""What `point` is called with, in the order of a save that deletes an old checkpoint. A save of a step that is there
already passes ``replaced`` before ``renamed``."""


def point(name: str) -> None:
    """Called between any two operations that a kill could part; does nothing. Tests replace it to die there."""
