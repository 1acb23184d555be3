"""A clone imports whole, however Python is started there, and never half of it from an installation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_floors import ROOT

WHERE = """
import importlib.util, nfnets
for name in ("nfnets", "nfnets.init", "nfnets.train", "nfnets.convert", "nfnets.errors"):
    print(importlib.util.find_spec(name).origin)
"""
"""Imports no torch: most of these runs only look where the parts are."""
USE = """
import importlib, torch, nfnets
from torch import nn
net = nfnets.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(4, 3, 8, 8))
assert type(net[0]).__name__ == "ScaledStdConv2d"
for name in ("nfnets.init.lsuv", "nfnets.train.config", "nfnets.convert.plan"):
    print(importlib.import_module(name).__file__)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source folders alone: nothing that an installation leaves there."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("nfnets", "init", "train"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "where.py").write_text(WHERE)
    return folder


WAYS = {
    "-c": ["-c", WHERE],
    "-m": ["-m", "where"],
    "script": ["where.py"],
    "standard input": ["-"],
    "converts": ["-c", USE],
}


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "not installed"])
@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_interpreter_in_a_clone_takes_all_of_it_from_there(
    clone: Path, way: str, installed: bool
) -> None:
    command = [sys.executable, *WAYS[way]]
    if not installed:  # an editable installation is a finder; without `site` there is none
        command[1:1] = ["-S"]
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {} if installed else {"PYTHONPATH": packages}
    given = WHERE if way == "standard input" else None
    done = subprocess.run(
        command, cwd=clone, env=environment, input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(clone.resolve()) for line in done.stdout.split()), done.stdout


def test_the_command_runs_in_a_clone(clone: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nfnets", "--version"], cwd=clone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
