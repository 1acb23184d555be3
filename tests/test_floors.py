"""Imports go down only: docs/design.md, "Floors"."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"nfnets": ROOT / "nfnets", "nfnets.init": ROOT / "init", "nfnets.train": ROOT / "train"}
# From the ground up; those of one floor do not know each other. A module outside of these packages stands for itself,
# as high as what it imports.
FLOORS = (
    {"nfnets.scale"},
    {"nfnets.structure"},
    {"nfnets.signal"},
    {"nfnets.init"},
    {"nfnets.convert", "nfnets.models"},
    {"nfnets.train.data"},
    {"nfnets.train.augment"},
    {"nfnets.train.loop"},
    {"nfnets.train.compare"},
)
FLOOR = {package: number for number, packages in enumerate(FLOORS) for package in packages}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


MODULES = modules()


def imported(module: str) -> Iterator[str]:
    """The modules of ours that a module imports anywhere in it: in functions and for types, too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name not in MODULES:
                name = name.rpartition(".")[0]
            if name in MODULES and name != module:
                yield name


IMPORTS = {module: {*imported(module)} for module in MODULES}


def part(module: str) -> str:
    """The package of `FLOORS` that holds a module, else the module itself."""
    return next((package for package in FLOOR if f"{module}.".startswith(f"{package}.")), module)


PARTS: dict[str, set[str]] = {part(module): set() for module in MODULES}
for module, below in IMPORTS.items():
    PARTS[part(module)] |= {part(name) for name in below} - {part(module)}


@pytest.mark.parametrize("graph", [IMPORTS, PARTS], ids=["modules", "packages"])
def test_no_imports_in_a_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def under(name: str) -> set[str]:
    """Everything that a package or a module rests on, however far down."""
    found: set[str] = set()
    pending = [name]
    while pending:
        new = PARTS[pending.pop()] - found
        found |= new
        pending += new
    return found


@pytest.mark.parametrize("package", sorted(FLOOR))  # sets have no order that two workers share
def test_packages_stand_on_lower_floors(package: str) -> None:
    assert PARTS[package], "no such package"
    beside = {other for other in under(package) & FLOOR.keys() if FLOOR[other] >= FLOOR[package]}
    assert beside == set(), f"{package} imports them, through {sorted(PARTS[package])}"


def test_every_package_has_a_floor() -> None:
    packages = {module for module, file in MODULES.items() if file.name == "__init__.py"} - {*FOLDERS}
    assert {package for package in packages if part(package) not in FLOOR} == set()


def test_files_stay_readable() -> None:
    long = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert {name: lines for name, lines in long.items() if lines > 450} == {}
