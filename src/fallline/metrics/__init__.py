"""What a run records of itself: its metrics file, the clock, peak memory, progress, and trackers of 🤗 Accelerate."""

from __future__ import annotations

from .clock import Clock, peak_memory, resident_memory
from .jsonl import Metrics, read
from .progress import Progress, sparkline
from .tracking import Trackers, check_trackers, trackers

__all__ = [
    "Clock",
    "Metrics",
    "Progress",
    "Trackers",
    "check_trackers",
    "peak_memory",
    "read",
    "resident_memory",
    "sparkline",
    "trackers",
]
