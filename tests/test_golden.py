"""No number changes by accident: see `golden.py`.

`nf` on every kind of net at both batch sizes; the other methods that measure at one in turn; those that do not on every
second kind. `make soak` runs all.
"""

from collections.abc import Callable
from typing import Any

import pytest
from golden import BATCHES, KINDS, MEASURED, cases, differences, kept
from soak import ALL

from nfnets.convert import list_methods

CASES = dict(cases())
KEPT = kept()


def later() -> set[str]:
    """The other batch size's entries, and every second one of methods that measure nothing."""
    measured = sorted(MEASURED - {"nf"})
    kinds = enumerate(KINDS)
    others = sorted({*list_methods()} - MEASURED)
    return {f"{k} | {m} | {BATCHES[(i + j) % 2]}" for i, k in kinds for j, m in enumerate(measured)} | {
        f"{k} | {m} | {BATCHES[0]}" for i, k in enumerate(KINDS) for j, m in enumerate(others) if (i + j) % 2
    }


CHOSEN = {name: make for name, make in CASES.items() if ALL or name not in later()}


def test_the_file_has_every_case_and_no_other() -> None:
    assert set(CASES) == set(KEPT)


@pytest.mark.parametrize(("name", "make"), CHOSEN.items(), ids=list(CHOSEN))
def test_golden(name: str, make: Callable[[], Any]) -> None:
    assert [*differences(KEPT[name], make())] == []
