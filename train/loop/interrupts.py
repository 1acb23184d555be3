"""Ctrl-C and SIGTERM noted between steps, so that a checkpoint never holds half a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

TERMINATED = 143  # 128 + SIGTERM: what a scheduler expects of a process that it ended


class Stopped(KeyboardInterrupt):
    """A second signal: the user does not want to wait for the step to end."""


class Interrupts:
    """While entered, the first SIGINT or SIGTERM only sets `pending`; a second one raises `Stopped` at once.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            raise Stopped
        self.pending = number

    def leave(self) -> None:
        """Raise what the noted signal stands for: KeyboardInterrupt, or SystemExit with 143."""
        if self.pending == signal.SIGTERM:
            raise SystemExit(TERMINATED)
        if self.pending:
            raise KeyboardInterrupt
