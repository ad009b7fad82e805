"""All rows of the folder `rows`: what the tests of test_common.py go over."""

from __future__ import annotations

from .rows import Row, likelihood, unlearning

ROWS: list[Row] = [*likelihood.ROWS, *unlearning.ROWS]
