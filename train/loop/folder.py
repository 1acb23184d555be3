"""A run's folder: whose it is, who works in it, and what it already holds."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nfnets import files
from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.loop import checkpoint
from nfnets.train.loop.result import read_result

CONFIG, LOG, RESULT, MODEL, EMA = (
    "config.json",
    "log.jsonl",
    "result.json",
    "model.safetensors",
    "ema.safetensors",
)


# Locks that this process holds. A forked child (a loader's worker) shares them, and would keep a folder locked for
# the seconds by which it outlives a killed run.
_HELD: set[IO[str]] = set()


def _let_go() -> None:
    while _HELD:
        _HELD.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class InUse(UserError):
    """A living process works in the folder."""


def finished(folder: Path, config: RunConfig, *, tested: bool = False) -> dict[str, Any] | None:
    """The result of this configuration, if the folder holds it.

    Args:
        folder: the run's.
        config: the run's.
        tested: a result that the test split has still to be read for does not count.

    Raises:
        UserError: when the folder belongs to another configuration (the differing fields are named), or what it
            holds is damaged.
    """
    if (theirs := _begun(folder)) is None:
        return None
    config = config.settled(theirs)
    theirs = theirs.settled(config)
    if theirs.fingerprint() != config.fingerprint():
        fields = "; ".join(config.differences(theirs))
        raise UserError(f"{folder}: holds another run ({fields}); choose another folder")
    result = _result(folder)
    if (
        result is not None
        and RunConfig.create(**result["config"]).settled(config).fingerprint() != config.fingerprint()
    ):
        raise UserError(
            f"{folder / RESULT}: another run's result; delete it, and the same command writes it again"
        )
    return None if result is None or (tested and untested(result)) else result


def as_begun(folder: Path, config: RunConfig) -> RunConfig:
    """The configuration, with what it leaves open as in the run that the folder holds, if there is one."""
    begun = _begun(folder)
    return config if begun is None else config.settled(begun)


def _begun(folder: Path) -> RunConfig | None:
    """The configuration of the run that the folder holds."""
    if not _holds(folder / CONFIG):
        return None
    begun = RunConfig.read(folder / CONFIG)
    # Of before threads and device were recorded there: how it ended tells them.
    there = (_result(folder) or {}).get("hardware", {})
    known = {"threads": there["threads"]} if "threads" in there else {}
    if "device" in there:
        known["device"] = "cpu" if there["device"] == "cpu" else "cuda"
    return begun.settled(known)


def _result(folder: Path) -> dict[str, Any] | None:
    if not (folder / RESULT).is_file():
        return None
    return read_result(folder / RESULT)


def lost(folder: Path, config: RunConfig, result: dict[str, Any]) -> str:
    """The weights that a finished run left and that are not there any more, "" where all are."""
    left = () if result["status"] != "done" else (MODEL,) if config.ema_decay is None else (MODEL, EMA)
    return " and ".join(name for name in left if not (folder / name).is_file())


def _holds(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError as error:  # a name that is too long
        raise UserError(f"{file.parent}: no folder ({error.strerror or error}); choose another one") from None


def untested(result: dict[str, Any]) -> bool:
    """Whether a run ended well without a look at the test split, as a search's do.

    Example:
        >>> untested({"status": "done", "test_accuracy": None}), untested({"status": "diverged"})
        (True, False)
    """
    return result["status"] == "done" and result.get("test_accuracy") is None


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, and locked while the context lasts.

    Raises:
        InUse: when a living process works in it.
        UserError: when it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder"
        ) from None
    with lock:
        try:
            # The system drops the lock when its process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise InUse(
                f"{folder}: in use by process {owner}; wait for it, or choose another folder"
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        _HELD.add(lock)
        try:
            yield
        finally:
            _HELD.discard(lock)


def in_use(folder: Path) -> bool:
    """Whether a living process works in the folder just now; another machine's too, if its file system locks.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with owned(folder):
        ...     in_use(folder)
        True
        >>> in_use(folder)
        False
    """
    try:
        lock = (folder / ".lock").open("a+")
    except OSError:  # nobody has been here, or it cannot be written: `owned` will say so
        return False
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def mark(folder: Path, config: RunConfig, *, resume: bool) -> None:
    """Write config.json: from now on the folder is this run's.

    Args:
        folder: locked by `owned`.
        config: the run's. It is written only once its data and model are known to be good, so that a mistyped
            model does not take the folder.
        resume: False deletes what an earlier run of this configuration left.

    Raises:
        UserError: when it cannot be written.
    """
    files.remove_leftovers(folder)
    if not resume:
        checkpoint.clear(folder)
        for name in (RESULT, LOG, MODEL, EMA):
            (folder / name).unlink(missing_ok=True)
    files.write(folder / CONFIG, config.to_json())
