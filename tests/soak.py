"""What `make test` samples and `make soak` (`NFNETS_GRID=all`) runs in full.

A test that only shows in length what a smaller one shows is marked `soak`; a grid of two axes is thinned, so that every
member of each axis stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

ALL = os.environ.get("NFNETS_GRID") == "all"


def thinned(rows: Iterable[Any], columns: Iterable[Any], every: int) -> list[tuple[Any, Any]]:
    """One in `every` of all pairs, along diagonals: each row and each column is met, with ever other partners."""
    rows, columns = list(rows), list(columns)
    assert every <= min(len(rows), len(columns)), "a row or a column would be left out"
    pairs = [(i + j, row, column) for i, row in enumerate(rows) for j, column in enumerate(columns)]
    return [(row, column) for at, row, column in pairs if ALL or at % every == 0]
