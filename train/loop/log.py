"""A run's JSONL log: every step once, whatever interrupted the run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nfnets.errors import UserError


class Log:
    """Rows appended to a file that a resumed run cuts back to where its checkpoint was.

    Args:
        path: the file.
        keep: bytes that belong to the checkpoint; what lies beyond is cut off.

    Raises:
        UserError: when the file is shorter than the checkpoint says, or cannot be written.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        try:
            self._file = path.open("ab")
            size = path.stat().st_size
            if size < keep:
                self._file.close()
                raise UserError(
                    f"{path}: {size} bytes, its checkpoint wrote {keep}; restore the file, or delete "
                    f"the folder to train again from the start"
                )
            self._file.truncate(keep)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows and hand them to the system."""
        text = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
        try:
            self._file.write(text.encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written ({error.strerror or error})") from error

    def sync(self) -> int:
        """Bytes so far, all of them on disk: a checkpoint may rely on them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: non-finite numbers become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a log; a last line that a kill cut short, and what is no row, are left out.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> _ = path.write_text('{"step": 1}\\n{"ste')
        >>> read(path)
        [{'step': 1}]
    """
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def steps_and_evaluations(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a log that are training steps, and those that are evaluations; none where there is no log."""
    rows = read(path) if path.exists() else []
    return [row for row in rows if "split" not in row], [row for row in rows if "split" in row]
