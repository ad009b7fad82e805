"""Compare: the same recipe once per choice, each run in a process of its own, and a report of which is better."""

from __future__ import annotations

from .merge import rebuild
from .run import Comparison, compare

__all__ = ["Comparison", "compare", "rebuild"]
