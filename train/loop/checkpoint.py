"""Atomic checkpoints: the last ones, and the best by validation."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nfnets import files
from nfnets.errors import UserError, first_line

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
BEST = "checkpoint.best.pt"


def names(keep: int) -> list[str]:
    """The checkpoints' names, the newest first.

    Example:
        >>> names(4)
        ['checkpoint.pt', 'checkpoint.previous.pt', 'checkpoint.previous-2.pt', 'checkpoint.previous-3.pt']
    """
    return [NAME, PREVIOUS, *(f"checkpoint.previous-{age}.pt" for age in range(2, keep))]


def present(folder: Path) -> list[str]:
    """The names of the checkpoints that there are, the newest first, whatever number is to be kept now."""
    found = [re.fullmatch(r"checkpoint\.previous-(\d+)\.pt", path.name) for path in folder.iterdir()]
    ages = [int(match[1]) for match in found if match]
    return [name for name in names(max(ages, default=1) + 1) if (folder / name).exists()]


def save(folder: Path, state: dict[str, Any], *, keep: int = 2, best: bool = False) -> None:
    """Save the state as the folder's checkpoint; the present one becomes the previous, and so on.

    At every moment at least one of them is whole, `fsync`ed and readable.

    Args:
        folder: the run's.
        state: tensors, numbers, strings, and dicts and lists of them; "step" among the keys.
        keep: how many of the last ones stay, at least 2.
        best: it becomes the best one, too (another name of the same file, where the file system has links).

    Raises:
        UserError: when the folder cannot be written or the disk is full; the present checkpoint is kept.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for step in (1, 2):
        ...     save(folder, {"step": step, "weight": torch.ones(2)})
        >>> load(folder)
        {'step': 2, 'weight': tensor([1., 1.])}
    """
    path = folder / NAME

    def write(partial: Path) -> None:
        _save(state, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        # The new file is whole already, so a crash between two of these renames loses at most the oldest.
        kept = names(keep)
        for older, newer in itertools.pairwise(reversed(kept)):
            if (folder / newer).exists():
                os.replace(folder / newer, folder / older)
        for name in set(present(folder)) - set(kept):
            (folder / name).unlink()

    files.write(path, write)
    if best:
        files.write(folder / BEST, lambda partial: _link(path, partial))


def save_best(folder: Path, state: dict[str, Any]) -> None:
    """Save a state as the best one alone: a kill may have come between a checkpoint and its second name."""
    files.write(folder / BEST, lambda partial: _save(state, partial))


def _save(state: dict[str, Any], path: Path) -> None:
    try:
        with path.open(
            "wb"
        ) as file:  # of a path it would write the name, and that is drawn anew for every file
            torch.save(state, file)
    except RuntimeError as error:  # what its zip writer makes of a full disk
        raise OSError(first_line(error)) from error


def _link(path: Path, other: Path) -> None:
    other.unlink(missing_ok=True)
    try:
        os.link(path, other)
    except OSError:  # a file system without links
        shutil.copyfile(path, other)


def load(folder: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
    """The newest whole checkpoint on the CPU, or None where there is none.

    Args:
        folder: the run's.
        say: is told when the last checkpoint is unreadable and the previous one is used.

    Raises:
        UserError: when there are checkpoints and none can be read.
    """
    faults = []
    for name in present(folder) if folder.is_dir() else ():
        path = folder / name
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or "step" not in state:
                raise ValueError("not a checkpoint of a run")
        except Exception as error:  # a damaged pickle raises almost anything
            # The first sentence: torch's go on to advise an unpickling that runs what is in the file.
            reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else "truncated"
            faults.append(f"{path}: unreadable ({reason})")
            continue
        if faults:
            say(f"{faults[0]}; went back to {name} at step {state['step']}")
        return state
    if faults:
        raise UserError(f"{'; '.join(faults)}; delete the folder to train again from the start")
    return None


def clear(folder: Path) -> None:
    """Delete every checkpoint."""
    for name in (*present(folder), BEST):
        (folder / name).unlink(missing_ok=True)
