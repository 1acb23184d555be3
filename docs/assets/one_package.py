"""MkDocs hook: the package's three source folders laid out as the one that is installed, for the API pages to read."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def on_startup(**_: Any) -> None:
    """Copy the sources to `build/api/nfnets`; before mkdocstrings looks there, which is when plugins are configured."""
    package = ROOT / "build" / "api" / "nfnets"
    shutil.rmtree(package, ignore_errors=True)
    for folder, target in (("nfnets", package), ("init", package / "init"), ("train", package / "train")):
        shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__"))
    # The docstrings' parser shows a doctest as code under "Examples", and as prose under "Example".
    for file in package.rglob("*.py"):
        file.write_text(re.sub(r"^( +)Example:$", r"\1Examples:", file.read_text(), flags=re.M))
