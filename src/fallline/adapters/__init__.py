"""Adapters: a frozen model, and a few parameters that change what it computes.

fallline.adapters.attach(model, "lora", rank=16)
...  # train: only the adapter's parameters require gradients
fallline.adapters.save(model, "out/")  # a PEFT checkpoint
fallline.adapters.merge(model)  # or: add it into the weights
"""

from .begin import attach
from .layers import activate, disabled, follow, names, remove
from .merging import merge, unmerge
from .peft import load, save
from .scaling import scaled

__all__ = ["activate", "attach", "disabled", "follow", "load", "merge", "names", "remove", "save", "scaled", "unmerge"]
