"""Time to accuracy: when each run first validated at a target, with the runs that never did counted as such."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfnets.train.loop.log import steps_and_evaluations


@dataclass(frozen=True)
class Times:
    """One arm at one batch size on its way to a target accuracy."""

    arm: str
    batch_size: int
    target: float
    epochs: tuple[float | None, ...]
    """Per seed, the epoch of the first validation that reached the target; None: not within the budget."""
    seconds: tuple[float | None, ...]
    """The same in seconds of training."""
    budget: float
    """Epochs that every run had."""

    @property
    def reached(self) -> int:
        """Runs that reached the target."""
        return sum(epoch is not None for epoch in self.epochs)


def censored_median(values: Sequence[float | None]) -> float | None:
    """The median where None stands for "later than all that was seen"; None where the median is not seen either.

    Leaving such runs out would reward an arm for the runs that it lost. With an even number the mean of the two
    in the middle, so that one of them being unseen leaves the median unseen.

    Args:
        values: One per run.

    Returns:
        The median, or None.

    Example:
        >>> censored_median([3.0, None, 5.0]), censored_median([3.0, None]), censored_median([4.0, 2.0])
        (5.0, None, 3.0)
    """
    there = sorted(math.inf if value is None else value for value in values)
    if not there:
        return None
    middle = len(there) // 2
    median = there[middle] if len(there) % 2 else (there[middle - 1] + there[middle]) / 2
    return None if math.isinf(median) else median


def targets(results: dict[str, Any]) -> dict[int, float]:
    """The validation accuracy to reach, by batch size.

    The experiment's own target if it declares one; else what the baseline's runs end with on average, less the
    margin that does not matter. None is given where no run of the baseline ended.
    """
    experiment = results["experiment"]
    declared = experiment.get("target")
    found = {}
    for batch_size in experiment["batch_sizes"]:
        ended = [
            run["val_accuracy"]
            for run in results["runs"]
            if run["final"]
            and run["arm"] == experiment["arms"][0]["name"]
            and run["batch_size"] == batch_size
            and run["status"] == "done"
        ]
        if declared is not None:
            found[batch_size] = declared
        elif ended:
            found[batch_size] = math.fsum(ended) / len(ended) - experiment["margin"]
    return found


def times(results: dict[str, Any], out: Path) -> list[Times]:
    """When the reported runs of every arm and batch size reached the target.

    Seconds are those of training alone: the step of the validation over the run's own steps a second, which
    counts neither evaluations nor waiting.

    Args:
        results: The content of `results.json`.
        out: The experiment's directory, where the logs are.

    Returns:
        One entry per arm and batch size that has a target and a reported run.
    """
    experiment = results["experiment"]
    found = []
    for batch_size, target in targets(results).items():
        for arm in experiment["arms"]:
            runs = [
                run
                for run in results["runs"]
                if run["final"] and run["arm"] == arm["name"] and run["batch_size"] == batch_size
            ]
            if not runs:
                continue
            epochs, seconds = [], []
            for run in runs:
                step = first_step(steps_and_evaluations(out / run["folder"] / "log.jsonl")[1], target)
                budget = run["config"]["epochs"]
                epochs.append(None if step is None else step * budget / max(1, run["total_steps"]))
                speed = run["images_per_second"]
                seconds.append(None if step is None or not speed else step * batch_size / speed)
            found.append(
                Times(
                    arm["name"],
                    batch_size,
                    target,
                    tuple(epochs),
                    tuple(seconds),
                    runs[0]["config"]["epochs"],
                )
            )
    return found


def first_step(evaluations: Sequence[dict[str, Any]], target: float) -> int | None:
    """The step of the first validation that reached the target, None if none did."""
    steps = (
        row["step"]
        for row in evaluations
        if row["split"] == "val" and row["accuracy"] is not None and row["accuracy"] >= target
    )
    return next(steps, None)


HEADINGS = ("arm", "batch", "target", "reached", "epochs, median", "seconds of training, median")


def cells(entry: Times) -> tuple[str, ...]:
    """One entry as text under `HEADINGS`."""
    epochs, seconds = censored_median(entry.epochs), censored_median(entry.seconds)
    return (
        entry.arm,
        str(entry.batch_size),
        f"{100 * entry.target:.2f} %",
        f"{entry.reached} of {len(entry.epochs)}",
        f"over {entry.budget:g}" if epochs is None else f"{epochs:.3g}",
        "–" if seconds is None else f"{seconds:.3g}",
    )
