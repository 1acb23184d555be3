"""Progress of a sweep in the terminal: one bar over all steps with the time left, a line per finished run."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nfnets.train.compare.board import Board
from nfnets.train.compare.experiment import Event, total_steps
from nfnets.train.compare.protocol import ExperimentConfig, Trial, rate
from nfnets.train.compare.tables import duration
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.loop import engine

Kind = tuple[str, int]
"""An arm and a batch size: runs of one kind take the same time."""


class Pace:
    """How long a sweep will still take, from how fast its kinds of steps were and how much was done meanwhile.

    left = Σ_k steps_left_k · t_k / (Σ_k steps_done_k · t_k / elapsed), with t_k the seconds of one step of an
    arm at a batch size. The divisor is 1 for one run at a time, and more with several processes at work.

    Args:
        steps: Steps of the whole sweep by kind (arm, batch size).

    Example:
        >>> pace = Pace({("bn", 64): 100, ("nf", 64): 100})
        >>> pace.seconds["bn", 64] = 0.1
        >>> pace.seconds["nf", 64] = 0.3
        >>> pace.done["bn", 64] = 100
        >>> pace.left(elapsed=10.0)  # 100 steps of 0.3 s, one run at a time
        30.0
    """

    def __init__(self, steps: dict[Kind, int]) -> None:
        self.steps = steps
        self.seconds: dict[Kind, float] = {}
        self.done: dict[Kind, int] = dict.fromkeys(steps, 0)
        self.before: dict[Kind, int] = dict.fromkeys(steps, 0)
        """Steps that were over when this process began: they say nothing of its speed."""

    def left(self, elapsed: float) -> float | None:
        """Seconds that are left after `elapsed` seconds, or None before anything is known."""
        if not self.seconds:
            return None
        typical = sum(self.seconds.values()) / len(self.seconds)

        def work(steps: dict[Kind, int]) -> float:
            return sum(count * self.seconds.get(kind, typical) for kind, count in steps.items())

        done = work(self.done)
        left = work(self.steps) - work(self.before) - done
        return left * elapsed / done if done > 0 else left


class SweepProgress:
    """A watcher for `run_experiment`: shows the sweep, and how long it will still take.

    Args:
        config: The experiment.
        data: Its data set.
        console: Where to draw.
    """

    def __init__(self, config: ExperimentConfig, data: Data, console: Console) -> None:
        self.config, self.data, self.console = config, data, console
        planned = config.planned()
        steps: dict[Kind, int] = {}
        for arm, batch_size, _, _ in planned:
            steps[arm, batch_size] = steps.get((arm, batch_size), 0) + self._steps(batch_size)
        self.pace = Pace(steps)
        self.progress = _progress(console, TextColumn("{task.fields[left]}"))
        self.task = self.progress.add_task("starting", total=sum(steps.values()), left="…")
        self.runs = len(planned)
        self.started = time.monotonic()
        self.done: dict[Trial, int] = {}
        """Steps of every run so far, whoever trained it."""
        self.open: dict[Trial, tuple[float, int | None]] = {}
        """When a run began here, and with which step."""
        self.over = 0
        self.anything_began = False

    def __enter__(self) -> SweepProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        trial = event.trial
        if event.kind == "begin":
            self.open[trial] = time.monotonic(), None
            self.anything_began = True
        elif event.kind == "end":
            self.over += 1
            self.progress.console.print(self._line(event), highlight=False)
            self._ended(trial, event.row)
        elif "split" in event.row:
            return
        else:
            self._stepped(trial, event.row["step"])
        left = self.pace.left(time.monotonic() - self.started)
        self.progress.update(
            self.task,
            completed=sum(self.done.values()),
            description=self._description(event),
            left="…" if left is None else f"about {duration(left)} left",
        )

    def _stepped(self, trial: Trial, step: int) -> None:
        kind = trial.arm, trial.batch_size
        began, first = self.open[trial]
        if first is None:  # an open run went on at its checkpoint
            self.open[trial] = time.monotonic(), step
            self.pace.before[kind] += step - 1
            self.pace.done[kind] -= step - 1
        elif kind not in self.pace.seconds or step - first >= 20:
            self.pace.seconds[kind] = (time.monotonic() - began) / max(1, step - first)
        self.pace.done[kind] += step - self.done.get(trial, 0)
        self.done[trial] = step

    def _ended(self, trial: Trial, result: dict[str, Any]) -> None:
        kind = trial.arm, trial.batch_size
        here = self.open.pop(trial, None) is not None
        whole = self._steps(trial.batch_size)
        found_at_start = not here and not self.anything_began
        counted = self.pace.before if found_at_start else self.pace.done
        counted[kind] += whole - self.done.get(trial, 0)
        self.done[trial] = whole
        if result["steps"] and result["train_seconds"]:
            self.pace.seconds[kind] = result["train_seconds"] / result["steps"]

    def _description(self, event: Event) -> str:
        loss = event.row.get("loss") if event.kind == "step" else None
        what = f"{len(self.open)} at once" if self.open else ""
        if len(self.open) == 1:
            what = words(next(iter(self.open))) + ("" if loss is None else f", loss {loss:.3f}")
        return f"run {min(self.runs, self.over + len(self.open))}/{self.runs} {what}"

    def _steps(self, batch_size: int) -> int:
        run: RunConfig = self.config.first_run()
        return total_steps(run.model_copy(update={"batch_size": batch_size, "accumulation": 1}), self.data)

    def _line(self, event: Event) -> Text:
        result = event.row
        if result["status"] == "done":
            outcome = Text(f"validation {100 * result['val_accuracy']:.2f} %")
        else:
            outcome = Text(f"diverged at step {result.get('diverged_at')}", "yellow")
        if event.trial in self.open:
            how = duration(time.monotonic() - self.open[event.trial][0])
        else:
            how = "by another process" if self.anything_began else "finished before"
        return Text.assemble(f"{self.over:>3}/{self.runs} {words(event.trial)}: ", outcome, f" ({how})")


def words(trial: Trial) -> str:
    """A trial in a few words.

    Example:
        >>> words(Trial("nf", 64, 0.1, 2))
        'nf, batch 64, lr 0.1, seed 2'
    """
    return f"{trial.arm}, batch {trial.batch_size}, lr {rate(trial.lr)}, seed {trial.seed}"


def train_with_progress(
    config: RunConfig, folder: Path, console: Console, tensorboard: bool = False
) -> dict[str, Any]:
    """`engine.run` with a bar over its steps and, on request, TensorBoard's event files in the run's folder."""
    board = Board(folder) if tensorboard else None
    with _progress(console, TextColumn("left"), TimeRemainingColumn(compact=True)) as progress:
        task = progress.add_task("starting", total=None)

        def show(row: dict[str, Any]) -> None:
            if board is not None:
                board(row)
            if "split" in row:
                words = f"validation {100 * row['accuracy']:.2f} %"
                progress.console.print(f"epoch {row['epoch']:g}: {words}", highlight=False)
            else:
                progress.update(
                    task, total=row["steps"], completed=row["step"], description=f"loss {row['loss']:.3f}"
                )

        try:
            result = engine.run(
                config,
                folder,
                on_step=show,
                say=lambda line: progress.console.print(Text(line), soft_wrap=True),
            )
            if board is not None:
                board.finish(result)
            return result
        finally:
            if board is not None:
                board.close()


def _progress(console: Console, *left: ProgressColumn) -> Progress:
    """A bar, and what is left; none in a pipe or a log, where its last state would stay for good."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *left,
        console=console,
        disable=not console.is_terminal,
    )
