"""No number changes by accident: see `golden.py`."""

from collections.abc import Callable
from typing import Any

import pytest
from golden import cases, differences, kept

CASES = dict(cases())
KEPT = kept()


def test_the_file_has_every_case_and_no_other() -> None:
    assert set(CASES) == set(KEPT)


@pytest.mark.parametrize(("name", "make"), CASES.items(), ids=list(CASES))
def test_golden(name: str, make: Callable[[], Any]) -> None:
    assert [*differences(KEPT[name], make())] == []
