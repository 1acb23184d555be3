"""Property-based tests draw the same examples every time, so that a commit is judged by what it changed.

`NFNETS_GRAPHS=1000` (`make soak`) draws that many random networks instead of 10, and new ones every time;
`NFNETS_GRID=all` runs the tests that are marked `soak`, too.
"""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import HealthCheck, settings
from soak import ALL

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.register_profile(
    "graphs",
    max_examples=int(os.environ.get("NFNETS_GRAPHS", "10")),
    derandomize="NFNETS_GRAPHS" not in os.environ,
    deadline=None,
    print_blob=True,
    suppress_health_check=slow,
)
settings.load_profile("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not ALL:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("soak")])
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


def pytest_collection_finish() -> None:
    """What was imported stays to the end: the collector need not look through it again, a tenth of the suite's time."""
    gc.collect()
    gc.freeze()
