"""Libraries beside timm and torchvision: each is a function that yields its nets, built from configurations only.

    make zoo-others

They are installed without their dependencies in a folder of their own, which comes last in the search path: torch,
NumPy and timm stay those of the environment. Nothing is downloaded when a net is built.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from benchmarks.zoo.others.net import Net

FOLDER = Path(__file__).parents[3] / ".others"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")

Library = Callable[[], Iterator[Net]]
LIBRARIES: dict[str, Library] = {}
"""By the name of the import package."""

for _name, _value in {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "NO_ALBUMENTATIONS_UPDATE": "1"}.items():
    os.environ.setdefault(_name, _value)  # libraries read these when they are imported
if FOLDER.is_dir() and str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))


def library(function: Library) -> Library:
    """Register a library under its function's name."""
    LIBRARIES[function.__name__] = function
    return function


@cache
def nets(name: str) -> dict[str, Net]:
    """The nets of a library by name; it is imported here.

    Raises:
        ImportError: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {net.name: net for net in LIBRARIES[name]()}


def installed(source: str) -> bool:
    """Whether models of a source can be built here; timm and torchvision always can."""
    return source not in LIBRARIES or find_spec(source) is not None


from benchmarks.zoo.others import detectors, graphs, images, language, medical, series  # noqa: E402, F401
