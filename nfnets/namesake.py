"""PyPI's `nfnets-pytorch` installs a package called `nfnets`, too: into the same folder, over the same files."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

OTHER = "nfnets-pytorch"


def mixed(folder: Path) -> str:
    """What to do where the other distribution's files lie among ours; "" where they do not.

    Args:
        folder: of our package.
    """
    try:
        theirs = Path(str(distribution(OTHER).locate_file("nfnets")))
    except PackageNotFoundError:
        return ""
    if theirs.resolve() != folder.resolve():
        return ""  # a clone, or a path of its own: nothing is overwritten
    return (
        f"{OTHER} is installed over nfnets, and both own the folder {folder.name}: run "
        f"pip uninstall {OTHER}, then pip install --force-reinstall --no-deps nfnets"
    )


def overwritten() -> str:
    """The same, where `import nfnets` gives the other one: it was installed later."""
    ours = hasattr(sys.modules["nfnets"], "__version__")
    return "" if ours else mixed(Path(__file__).parent)
