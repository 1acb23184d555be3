"""`make coverage` fails where a package is too little tested, and where it was not measured at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import branches

FILES = ("nfnets/layers.py", "/venv/site-packages/nfnets/init/lsuv.py", "train\\config.py")


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ((9, 9, 9), 0),
        ((9, 8, 9), 1),
        ((9, 9, None), 1),
    ],
    ids=["enough", "too few", "none measured"],
)
def test_every_package_is_measured_and_above_the_goal(
    taken: tuple[int | None, ...], expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        name: {"summary": {"covered_branches": n, "num_branches": 10}}
        for name, n in zip(FILES, taken, strict=True)
        if n is not None
    }
    (tmp_path / "coverage.json").write_text(json.dumps({"files": found}))
    assert branches.main(str(tmp_path / "coverage.json")) == expected
    assert capsys.readouterr().out.count("branches") == len(branches.PACKAGES)
