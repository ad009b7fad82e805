"""The report of a comparison: statistics, sentences that claim no more than them, a table, CSV, JSON and one HTML page.

Everything here reads a record, a plain mapping that a driver made, and runs nothing.
"""

from __future__ import annotations

from .analysis import analyse
from .folder import write
from .tables import table

__all__ = ["analyse", "table", "write"]
