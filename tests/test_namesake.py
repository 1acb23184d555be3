"""PyPI's nfnets-pytorch installs `nfnets`, too: one line says so, and nothing where the two lie apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_floors import ROOT

THEIRS = "from os import sep\n"  # an `__init__` without anything of ours


def installed(folder: Path) -> Path:
    """Ours, as a wheel lays it."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nfnets", folder / "nfnets", ignore=ignore)
    for name in ("init", "train"):
        shutil.copytree(ROOT / name, folder / "nfnets" / name, ignore=ignore)
    return folder


def other(folder: Path) -> Path:
    """What pip writes about theirs."""
    about = folder / "nfnets_pytorch-0.1.3.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: nfnets-pytorch\nVersion: 0.1.3\n")
    (about / "RECORD").write_text("nfnets/__init__.py,,\nnfnets/agc.py,,\n")
    return folder


def run(*folders: Path, code: str = "import nfnets") -> subprocess.CompletedProcess[str]:
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, folders), *packages])}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(
        command, cwd=folders[0], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("case", ["alone", "ours last", "theirs last", "apart"])
def test_one_line_says_what_to_do(case: str, tmp_path: Path) -> None:
    folder = installed(tmp_path / "site")
    remedy = "pip uninstall nfnets-pytorch, then pip install --force-reinstall --no-deps nfnets"
    if case in ("ours last", "theirs last"):
        other(folder)
    if case == "theirs last":
        (folder / "nfnets" / "__init__.py").write_text(THEIRS)
        done = run(folder, code="from nfnets.cli import main; main()")
        assert done.returncode == 2
        assert done.stderr.startswith("error: nfnets-pytorch is installed over nfnets")
        assert remedy in done.stderr
        assert len(done.stderr.splitlines()) == 1
        return
    done = run(folder, *([other(tmp_path / "elsewhere")] if case == "apart" else []))
    assert done.returncode == 0, done.stderr
    assert (remedy in done.stderr) is (case == "ours last"), done.stderr
