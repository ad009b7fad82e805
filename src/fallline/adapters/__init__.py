"""Adapters: a frozen model, and a few parameters that change what it computes.

fallline.adapters.attach(model, "lora", rank=16)
...  # train: only the adapter's parameters require gradients
fallline.adapters.save(model, "out/")  # a PEFT checkpoint
fallline.adapters.merge(model)  # or: add it into the weights
"""

from .layers import activate, attach, disabled, merge, names, remove, unmerge
from .peft import load, save

__all__ = ["activate", "attach", "disabled", "load", "merge", "names", "remove", "save", "unmerge"]
