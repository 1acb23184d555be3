"""Compiled and scripted code, run as the Python it was written in."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

_SCRIPTED: Any = torch.jit.ScriptFunction.__call__
_recordings = 0
_undo = contextlib.ExitStack()
_counting = threading.Lock()


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Compiled and scripted code runs as the Python it was written in: else hooks and the recorder would miss it.

    Both are switches of the whole process. Threads that record at the same time share them: the first turns, the last
    turns back.
    """
    global _recordings
    with _counting:
        if not _recordings:
            _undo.enter_context(_eager())
            _undo.enter_context(_unscripted())
        _recordings += 1
    try:
        yield
    finally:
        with _counting:
            _recordings -= 1
            if not _recordings:
                _undo.close()


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiled models run eagerly. Without one, importing the compiler would take seconds."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()


@contextlib.contextmanager
def _unscripted() -> Iterator[None]:
    """Functions under `torch.jit.script` run as Python. One that was loaded from a file has none, and stays."""
    kind: Any = torch.jit.ScriptFunction
    kind.__call__ = _call_written
    try:
        yield
    finally:
        kind.__call__ = _SCRIPTED


def _call_written(function: Any, *args: Any, **kwargs: Any) -> Any:
    written = getattr(function, "_torchdynamo_inline", None)
    return _SCRIPTED(function, *args, **kwargs) if written is None else written(*args, **kwargs)
