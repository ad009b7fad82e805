"""All rows of the folder `rows`: what the tests of test_common.py go over."""

from __future__ import annotations

from .rows import Row, frugal, layerwise, low_rank, normalised, orthogonal, plain, rounded, spikes, stateless, steadied

ROWS: list[Row] = [
    *plain.ROWS,
    *rounded.ROWS,
    *low_rank.ROWS,
    *frugal.ROWS,
    *normalised.ROWS,
    *spikes.ROWS,
    *stateless.ROWS,
    *steadied.ROWS,
    *orthogonal.ROWS,
    *layerwise.ROWS,
]
