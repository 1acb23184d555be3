"""No number changes by accident: see `golden.py`.

Every method on every kind of net; at both batch sizes for `nf`, at one in turn for the other methods that measure
(`make soak`: always at both).
"""

from collections.abc import Callable
from typing import Any

import pytest
from golden import BATCHES, KINDS, MEASURED, cases, differences, kept
from soak import ALL

CASES = dict(cases())
KEPT = kept()


def later() -> set[str]:
    """The other batch size's entries."""
    measured = sorted(MEASURED - {"nf"})
    kinds = enumerate(KINDS)
    return {f"{k} | {m} | {BATCHES[(i + j) % 2]}" for i, k in kinds for j, m in enumerate(measured)}


CHOSEN = {name: make for name, make in CASES.items() if ALL or name not in later()}


def test_the_file_has_every_case_and_no_other() -> None:
    assert set(CASES) == set(KEPT)


@pytest.mark.parametrize(("name", "make"), CHOSEN.items(), ids=list(CHOSEN))
def test_golden(name: str, make: Callable[[], Any]) -> None:
    assert [*differences(KEPT[name], make())] == []
