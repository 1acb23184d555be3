"""How this project writes files: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nfnets.errors import UserError, first_line

_PREFIX = ".tmp-"


def write(path: str | Path, content: str | bytes | Callable[[Path], object]) -> Path:
    """Write a file so that a full disk, an error or a kill at any point leaves the old one or the new one, whole.

    Args:
        path: The file. It is made with the mode that the umask gives; one that is there keeps its own. A link stays a
            link, and what is no file (a pipe, /dev/stdout) is written straight into.
        content: Text (UTF-8), bytes, or a function that writes to the path it is given, which has the same suffix.

    Returns:
        The path.

    Raises:
        UserError: the folder is missing or cannot be written, or the disk is full.

    Example:
        >>> import tempfile
        >>> file = write(Path(tempfile.mkdtemp()) / "notes.txt", "whole")
        >>> file.read_text(), [other.name for other in file.parent.iterdir()]
        ('whole', ['notes.txt'])
    """
    path = Path(path)
    with replacing(path) as (partial,):
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary files to write, which take the place of others once all of them are whole and on the disk.

    An error inside the context, or one of the file system, leaves every file as it was. A kill can come between two of
    several renames, never within one.

    Args:
        *paths: The files, as for `write`.

    Yields:
        A path for each, beside it and with its suffix.

    Raises:
        UserError: as `write`.
    """
    made: list[_Partial] = []
    at = paths[0]
    try:
        for at in paths:
            made.append(_Partial(at))
        at = paths[0]
        yield [partial.path for partial in made]
        for step in (_Partial.finish, _Partial.put):
            for partial in made:
                at = partial.target
                step(partial)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"{at}: cannot be written ({reason}); free some space, or choose another place"
        ) from error
    finally:
        for partial in made:
            partial.path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what writers that were killed left half-written in a folder in which nobody writes just now."""
    for leftover in folder.glob(f"{_PREFIX}*"):
        leftover.unlink(missing_ok=True)


class _Partial:
    """A temporary file that is to take the place of another one."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.into = target if target.exists() and not target.is_file() and not target.is_dir() else None
        """A pipe or a device: nothing can take its place, so it is written into."""
        self.place = Path(os.path.realpath(target))
        if self.into is None and self.place.exists():
            self.place.open(
                "ab"
            ).close()  # a folder, or a file that is not ours to change: the system says so
        beside = Path(tempfile.gettempdir()) / target.name if self.into is not None else self.place
        self.path = beside.with_name(f"{_PREFIX}{secrets.token_hex(6)}{target.suffix}")
        handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self.mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        if self.into is None and self.place.exists():
            self.mode = stat.S_IMODE(self.place.stat().st_mode)

    def finish(self) -> None:
        """Bring it to the disk, with the mode it shall have."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())
        self.path.chmod(self.mode)  # its writer may have put a file for its owner alone in its place

    def put(self) -> None:
        """Let it take the other's place."""
        if self.into is not None:
            self.into.write_bytes(self.path.read_bytes())
            return
        os.replace(self.path, self.place)
        # The rename, too; where a file system or Windows has no such thing, it is as safe as it can be.
        with contextlib.suppress(OSError):
            folder = os.open(self.place.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
