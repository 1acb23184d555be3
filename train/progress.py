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

from nfnets.train import engine
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.experiment import Event, total_steps
from nfnets.train.protocol import ExperimentConfig, Trial


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
        steps = sum(self._steps(batch_size) for _, batch_size, _, _ in planned)
        self.progress = Progress(
            *_columns(),
            console=console,
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task("starting", total=steps)
        self.runs = len(planned)
        self.done = 0
        self.steps: dict[Trial, int] = {}
        self.began: dict[Trial, float] = {}

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
            self.began[trial] = time.monotonic()
        elif event.kind == "end":
            self.done += 1
            self.progress.console.print(self._line(event), highlight=False)
            self.steps[trial] = self._steps(trial.batch_size)
            self.began.pop(trial)
        elif "split" not in event.row:
            self.steps[trial] = event.row["step"]
        else:
            return
        open_ = len(self.began)
        loss = f", loss {event.row['loss']:.3f}" if event.kind == "step" else ""
        what = f"{words(trial)}{loss}" if open_ == 1 else f"{open_} at once" if open_ else ""
        self.progress.update(
            self.task,
            completed=sum(self.steps.values()),
            description=f"run {self.done + open_}/{self.runs} {what}",
        )

    def _steps(self, batch_size: int) -> int:
        run: RunConfig = self.config.first_run()
        return total_steps(run.model_copy(update={"batch_size": batch_size}), self.data)

    def _line(self, event: Event) -> str:
        result = event.row
        if result["status"] == "done":
            outcome = f"validation {100 * result['val_accuracy']:.2f} %"
        else:
            outcome = f"[yellow]diverged at step {result.get('diverged_at')}[/]"
        trained = event.trial in self.steps
        how = f"{time.monotonic() - self.began[event.trial]:.0f} s" if trained else "finished before"
        return f"{self.done:>3}/{self.runs} {words(event.trial)}: {outcome} ({how})"


def words(trial: Trial) -> str:
    """A trial in a few words.

    Example:
        >>> words(Trial("nf", 64, 0.1, 2))
        'nf, batch 64, lr 0.1, seed 2'
    """
    return f"{trial.arm}, batch {trial.batch_size}, lr {trial.lr:g}, seed {trial.seed}"


def train_with_progress(config: RunConfig, folder: Path, console: Console) -> dict[str, Any]:
    """`engine.run` with a bar over its steps."""
    with Progress(*_columns(), console=console) as progress:
        task = progress.add_task("starting", total=None)

        def show(row: dict[str, Any]) -> None:
            if "split" in row:
                words = f"validation {100 * row['accuracy']:.2f} %"
                progress.console.print(f"epoch {row['epoch']:g}: {words}", highlight=False)
            else:
                progress.update(
                    task, total=row["steps"], completed=row["step"], description=f"loss {row['loss']:.3f}"
                )

        return engine.run(
            config, folder, on_step=show, say=lambda line: progress.console.print(line, highlight=False)
        )


def _columns() -> list[ProgressColumn]:
    return [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    ]
