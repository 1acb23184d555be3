"""TensorBoard beside JSONL: the same rows as scalars, for those who keep it open."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any

from nfnets.errors import UserError
from nfnets.signal import SignalReport
from nfnets.train.compare.experiment import Event

FOLDER = "tensorboard"


def writer(folder: Path, first_step: int | None = None) -> Any:
    """A TensorBoard writer; what the folder's earlier writers wrote from `first_step` on is hidden.

    Args:
        folder: for its event files.
        first_step: an interrupted run goes on here, and every step is shown once.

    Returns:
        A `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        UserError: TensorBoard is not installed.
    """
    return _writer_class()(str(folder), purge_step=first_step)


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard: TensorBoard is not installed; pip install tensorboard, or leave --tensorboard away "
            "(log.jsonl holds the same numbers)"
        ) from None
    return SummaryWriter


class Board:
    """Rows of one run's log as scalars: train/loss, train/lr, train/clipped, val/loss, val/accuracy, by step.

    Args:
        folder: The run's; the event files go to `<folder>/tensorboard`.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        _writer_class()  # before anything is trained
        self.folder = folder / FOLDER
        self.writer: Any = None

    def __call__(self, row: dict[str, Any]) -> None:
        """Take in a row of the log."""
        if self.writer is None:
            self.writer = writer(self.folder, row["step"])
        split = row.get("split", "train")
        for name, value in row.items():
            if name in ("loss", "lr", "accuracy", "clipped") and value is not None:
                self.writer.add_scalar(f"{split}/{name}", value, row["step"])

    def finish(self, result: dict[str, Any]) -> None:
        """Add what is known at the end: test/loss, test/accuracy, test/ece, at the last step; and close."""
        if self.writer is None:  # it was finished before
            return
        for name in ("loss", "accuracy", "ece"):
            value = result.get("ece" if name == "ece" else f"test_{name}")
            if value is not None and math.isfinite(value):
                self.writer.add_scalar(f"test/{name}", value, result["steps"])
        self.close()

    def close(self) -> None:
        """Write out what is buffered."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class Boards:
    """A watcher for `run_experiment`: every run that is trained here gets a `Board`.

    Args:
        out: The experiment's directory. `tensorboard --logdir <out>` shows all runs.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, out: Path) -> None:
        _writer_class()  # before anything is trained
        self.out = out
        self.boards: dict[str, Board] = {}

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        name = event.trial.folder
        if event.kind == "step":
            self.boards.setdefault(name, Board(self.out / "runs" / name))(event.row)
        elif event.kind == "end" and name in self.boards:
            self.boards.pop(name).finish(event.row)

    def __enter__(self) -> Boards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for board in self.boards.values():
            board.close()


def write_signal(report: SignalReport, folder: Path) -> None:
    """A signal report as scalars by step, in a folder of its own under the given one."""
    board = writer(folder / FOLDER / "signal")
    report.to_tensorboard(board)
    board.close()
