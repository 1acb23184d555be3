"""One atomic checkpoint, and the one before it."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nfnets.errors import UserError

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that a crash at any point leaves the old one or the new one, whole.

    A temporary file beside it, fsync, `os.replace`, fsync of the folder.

    Args:
        path: the file.
        write: writes the content to the path it is given.

    Raises:
        UserError: when the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its zip writer.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error}); free or choose another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, state: dict[str, Any]) -> None:
    """Save the state as the folder's checkpoint; the present one becomes the previous.

    At every moment at least one of the two is whole, `fsync`ed and readable.

    Args:
        folder: the run's.
        state: tensors, numbers, strings, and dicts and lists of them; "step" among the keys.

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

    def write(temporary: Path) -> None:
        torch.save(state, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if path.exists():
            # The new file is whole already, so a crash between the two renames loses nothing.
            os.replace(path, folder / PREVIOUS)

    write_atomic(path, write)


def load(folder: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
    """The newest whole checkpoint on the CPU, or None where there is none.

    Args:
        folder: the run's.
        say: is told when the last checkpoint is unreadable and the previous one is used.

    Raises:
        UserError: when there are checkpoints and none can be read.
    """
    faults = []
    for name in (NAME, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or "step" not in state:
                raise ValueError("not a checkpoint of a run")
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            faults.append(f"{path}: unreadable ({str(error).splitlines()[0] if str(error) else 'truncated'})")
            continue
        if faults:
            say(f"{faults[0]}; went back to {name} at step {state['step']}")
        return state
    if faults:
        raise UserError(f"{'; '.join(faults)}; delete the folder to train again from the start")
    return None


def clear(folder: Path) -> None:
    """Delete both checkpoints."""
    for name in (NAME, PREVIOUS, NAME + ".tmp"):
        (folder / name).unlink(missing_ok=True)
