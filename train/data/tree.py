"""A folder of class folders as it is on disk: what counts as an image of it, and what is refused."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nfnets.errors import UserError

Sample = tuple[str, int]


class File(NamedTuple):
    """A file by the path that leads to it, and by the one where it lies."""

    path: str
    real: str
    linked: bool
    """Whether a link was followed between the root and it."""


def listing(root: Path, is_image: Callable[[str], bool]) -> tuple[list[Sample], list[str]]:
    """Images with their class, and the classes' names: `root/CLASS/**/image`, both in alphabetical order.

    Hidden files and folders (`.git`, `.ipynb_checkpoints`, `._photo.jpg`) are none of the data.

    Args:
        root: holds a folder for each class.
        is_image: by the path.

    Returns:
        (path, class) pairs, and the names.

    Raises:
        UserError: no class folders, one without an image, or a link that leads back to where it lies.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not hidden(entry.name))
    except OSError as error:
        raise UserError(f"{root}: cannot be read ({error.strerror or error})") from None
    if not names:
        raise UserError(f"no class folder in {root}; expected images in {root}/CLASS/")
    samples: list[Sample] = []
    empty = []
    for label, name in enumerate(names):
        before = len(samples)
        for _, files in sorted(walk(root / name)):
            samples += [(file.path, label) for file in sorted(files) if is_image(file.path)]
        if len(samples) == before:
            empty.append(name)
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        many = "s" if len(empty) > 1 else ""
        raise UserError(f"{root}: no image in class folder{many} {shown}; add images or remove it")
    return samples, names


def walk(root: Path) -> Iterator[tuple[str, list[File]]]:
    """Every folder that is not hidden at and under `root`, links followed, with its files that are not hidden.

    Raises:
        UserError: a link leads back to a folder that holds it: what is there would count again and again.
    """
    pending: list[tuple[str, tuple[str, ...], bool]] = [(str(root), (os.path.realpath(root),), False)]
    while pending:
        folder, chain, linked = pending.pop()
        files = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if hidden(entry.name):
                    continue
                link = entry.is_symlink()
                real = os.path.realpath(entry.path) if link else os.path.join(chain[-1], entry.name)
                if not entry.is_dir():
                    files.append(File(entry.path, real, linked or link))
                elif link and any(os.path.commonpath([real, place]) == real for place in chain):
                    raise UserError(f"{entry.path}: a link back to {real}, which holds it; remove the link")
                else:
                    pending.append((entry.path, (*chain, real), linked or link))
        yield folder, files


def hidden(name: str) -> bool:
    """Whether a file or a folder of that name is hidden."""
    return name.startswith(".")


def every_image_once(roots: Iterable[Path], is_image: Callable[[str], bool]) -> None:
    """Refuse links by which one image counts twice: in two splits or classes, or twice in one.

    Args:
        roots: of the splits.
        is_image: by the path.

    Raises:
        UserError: names the image's two places.
    """
    roots = list(roots)
    real = [os.path.realpath(root) for root in roots]
    apart = all(os.path.commonpath(pair) not in pair for pair in itertools.combinations(real, 2))
    if apart and not any(file.linked for root in roots for _, files in walk(root) for file in files):
        return  # a million images need not be remembered
    first: dict[str, str] = {}
    for file in (file for root in roots for _, files in walk(root) for file in files if is_image(file.path)):
        if first.setdefault(file.real, file.path) != file.path:
            raise UserError(
                f"{file.path} and {first[file.real]} are one file, by a link; expected every image once: remove one"
            )
