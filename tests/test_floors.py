"""Imports go down only: docs/design.md, "Floors"."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    (
        "nfnets.functional",
        "nfnets.gains",
        "nfnets.activations",
        "nfnets.graph",
        "nfnets.nested",
        "nfnets.copying",
        "nfnets.preserve",
        "nfnets.noise",
        "nfnets.trace",
        "nfnets.written",
        "nfnets.whose",
        "nfnets.errors",
        "nfnets.given",
        "nfnets.files",
        "nfnets.plain",
        "nfnets.unitwise",
        "nfnets.snapshot",
        "nfnets.head",
    ),
    (
        "nfnets.layers",
        "nfnets.blocks",
        "nfnets.skip_layers",
        "nfnets.before_step",
        "nfnets.agc",
        "nfnets.centralization",
        "nfnets.parameter_groups",
        "nfnets.verify",
        "nfnets.predict",
        "nfnets.privacy",
    ),
    ("nfnets.scale",),
    ("nfnets.structure",),
    ("nfnets.init",),
    ("nfnets.convert", "nfnets.signal", "nfnets.models"),
    (
        "nfnets.train.config",
        "nfnets.train.keyed",
        "nfnets.train.hardware",
        "nfnets.train.models",
        "nfnets.train.names",
        "nfnets.train.inputs",
        "nfnets.train.weights",
        "nfnets.train.recipes",
        "nfnets.train.named_recipes",
        "nfnets.train.recipe",
    ),
    ("nfnets.train.data",),
    ("nfnets.train.augment",),
    ("nfnets.train.loop",),
    ("nfnets.train.compare",),
    ("nfnets.train", "nfnets.hub", "nfnets.callbacks"),
    (
        "nfnets.cli",
        "nfnets.cli_options",
        "nfnets.cli_examples",
        "nfnets.cli_runs",
        "nfnets.cli_console",
        "nfnets.__main__",
        "nfnets.train.__main__",
    ),
]
FOLDERS = {"nfnets": ROOT / "nfnets", "nfnets.init": ROOT / "init", "nfnets.train": ROOT / "train"}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


MODULES = modules()


def floor(module: str) -> int | None:
    """Of the longest name that holds it: a package's door stands above the package."""
    held = {name: number for number, names in enumerate(FLOORS) for name in names}
    found = [name for name in held if module == name or module.startswith(name + ".")]
    return held[max(found, key=len)] if found else None


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module or "" for name in names}
    return {name for name in found if name.split(".")[0] == "nfnets"}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "nfnets"])
def test_imports_go_down_only(module: str) -> None:
    here = floor(module)
    assert here is not None, f"{module} stands on no floor: name it in docs/design.md and here"
    for name in imported(MODULES[module]) - {"nfnets"}:
        below = floor(name)
        assert below is not None, f"{module} imports {name}, which stands on no floor"
        assert below <= here, f"{module} (floor {here}) imports {name} (floor {below})"


def test_files_stay_readable() -> None:
    long = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert {name: lines for name, lines in long.items() if lines > 450} == {}
