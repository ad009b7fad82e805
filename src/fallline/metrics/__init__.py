"""What a run records of itself: its metrics file, the clock, peak memory, progress, and trackers of 🤗 Accelerate."""

from __future__ import annotations

from .clock import RATES, Clock, peak_memory, resident_memory
from .jsonl import Metrics, read
from .progress import Progress, sparkline
from .tracking import Trackers, check_trackers, trackers
from .utilisation import product_rate, token_flops

__all__ = [
    "RATES",
    "Clock",
    "Metrics",
    "Progress",
    "Trackers",
    "check_trackers",
    "peak_memory",
    "product_rate",
    "read",
    "resident_memory",
    "sparkline",
    "token_flops",
    "trackers",
]
