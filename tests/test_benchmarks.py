"""`make bench` runs: every module's small sizes fit its function, and those of the shorter ones are run."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import pytest

from benchmarks.run import met
from tests.test_floors import ROOT

NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_small_sizes_are_arguments(name: str) -> None:
    module: Any = importlib.import_module(f"benchmarks.{name}")
    inspect.signature(module.rows).bind(**module.SMALL)


@pytest.mark.parametrize("name", ["agc", "convert"])
def test_the_rows_of_the_table(name: str) -> None:
    module: Any = importlib.import_module(f"benchmarks.bench_{name}")
    found = module.rows(**module.SMALL)
    assert found
    for row in found:
        assert {"what", "ours_ms", "peer", "peer_ms", "ratio", "target"} <= row.keys()
        assert all(0 < row[key] < math.inf for key in ("ours_ms", "peer_ms", "ratio"))
        assert not row["target"] or met(row["ratio"], row["target"]) is not None
