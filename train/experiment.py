"""Running a comparison: what is left of the sweep, one run after the other, into `results.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from nfnets.errors import UserError
from nfnets.train import workers
from nfnets.train.config import RunConfig
from nfnets.train.data import Data, load
from nfnets.train.protocol import Arm, ExperimentConfig, Trial, choose
from nfnets.train.workers import Task

__all__ = ["Arm", "Event", "ExperimentConfig", "Trial", "choose", "run_experiment"]

FORMAT = 1
# What a finished run passes on to the report.
REPORTED = (
    "status",
    "val_accuracy",
    "val_loss",
    "steps",
    "train_seconds",
    "images_per_second",
    "peak_memory_mb",
)
FROM_TEST = ("test_accuracy", "test_loss", "ece")


@dataclass(frozen=True)
class Event:
    """What a watcher of the sweep is told: a run begins, took a step, or is over."""

    kind: Literal["begin", "step", "end"]
    trial: Trial
    row: dict[str, Any]
    """The logged step ("step") or the result ("end")."""


def run_experiment(
    config: ExperimentConfig,
    out: Path,
    *,
    watch: Callable[[Event], None] | None = None,
    command: str = "",
    about: dict[str, Any] | None = None,
    data: Data | None = None,
    jobs: int = 0,
) -> dict[str, Any]:
    """Run the whole sweep, or what is left of it, and write `<out>/results.json`.

    Runs live in `<out>/runs/<arm>-b<batch>-lr<lr>-s<seed>/`. Finished ones are read back, an open one resumes
    from its checkpoint. Arms, seeds, batch sizes and learning rates may be added to a finished experiment.

    Args:
        config: The experiment.
        out: Its directory, created if need be.
        watch: Called with an `Event` when a run begins, after each step, and when it ends.
        command: The command line that reproduces the experiment, for the report.
        about: More entries for `results.json` (conversion plans, …).
        data: The data set, if it is at hand; else it is loaded to know its sizes.
        jobs: Runs at once, each in a process of its own; 0 runs them one by one in this process.

    Returns:
        The content of `results.json`: everything that the report needs beside the JSONL logs.

    Raises:
        UserError: `out` holds another experiment, cannot be written, or a configuration is impossible.
        KeyboardInterrupt: after the open run's state was saved and `results.json` written with what there is.
    """
    data = load(config.first_run()) if data is None else data
    largest = max(config.batch_sizes)
    if largest > len(data.train):
        raise UserError(
            f"batch size {largest}: expected at most {len(data.train)}, the training images there are"
        )
    claim(config, out)
    records: dict[Trial, dict[str, Any]] = {}
    chosen: dict[tuple[str, int], float] = {}

    def perform(trials: Iterable[Trial]) -> None:
        by_folder = {out / "runs" / trial.folder: trial for trial in trials if trial not in records}
        tasks = [Task(config.run_config(trial), folder) for folder, trial in by_folder.items()]

        def begin(task: Task) -> None:
            tell("begin", by_folder[task.folder], {})

        def on_row(task: Task, row: dict[str, Any]) -> None:
            tell("step", by_folder[task.folder], row)

        performed = workers.apart(tasks, begin, on_row, jobs) if jobs else workers.here(tasks, begin, on_row)
        for task, result in performed:
            trial = by_folder[task.folder]
            records[trial] = result
            tell("end", trial, result)
            save(complete=False)

    def tell(kind: Literal["begin", "step", "end"], trial: Trial, row: dict[str, Any]) -> None:
        if watch is not None:
            watch(Event(kind, trial, row))

    def save(complete: bool) -> dict[str, Any]:
        results = collect(config, data, records, chosen)
        results |= {"complete": complete, "command": command, "jobs": jobs} | (about or {})
        write_json(out / "results.json", results)
        return results

    try:
        searches = config.searches()
        perform(trial for search in searches if len(search) > 1 for trial in search)
        for search in searches:  # a single candidate leaves nothing to choose between
            tried = [(trial.lr, records[trial]) for trial in search] if len(search) > 1 else []
            chosen[search[0].arm, search[0].batch_size] = choose(tried) if tried else search[0].lr
        perform(config.finals(chosen))
    except (KeyboardInterrupt, SystemExit):
        save(complete=False)
        raise
    return save(complete=True)


def collect(
    config: ExperimentConfig,
    data: Data,
    records: dict[Trial, dict[str, Any]],
    chosen: dict[tuple[str, int], float],
) -> dict[str, Any]:
    """`results.json` from the runs that there are. Test numbers are kept for reported runs only."""
    finals = (
        set(config.finals(chosen)) if len(chosen) == len(config.arms) * len(config.batch_sizes) else set()
    )
    runs = []
    for trial, result in records.items():
        keys = REPORTED + (FROM_TEST if trial in finals else ())
        runs.append(
            asdict(trial)
            | {"folder": f"runs/{trial.folder}", "final": trial in finals}
            | {"total_steps": total_steps(config.run_config(trial), data)}
            | {key: _finite(result.get(key)) for key in keys}
            | {"diverged_at": result.get("diverged_at")}
            | {"config": config.run_config(trial).model_dump(mode="json")}
        )
    some = next(iter(records.values()), {})
    return {
        "format": FORMAT,
        "experiment": config.model_dump(mode="json"),
        "tuning_seed": config.tuned_with,
        "data": describe(config.first_run().data, data),
        "chosen": [{"arm": arm, "batch_size": b, "lr": lr} for (arm, b), lr in chosen.items()],
        "runs": runs,
        "versions": some.get("versions", {}),
        "hardware": some.get("hardware", {}),
    }


def total_steps(config: RunConfig, data: Data) -> int:
    """Optimizer steps of a run: whole batches only, `epochs` times."""
    return config.epochs * (len(data.train) // config.batch_size)


def describe(name: str, data: Data) -> dict[str, Any]:
    """The data set's sizes, for the report."""
    splits = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
    shape = {"num_classes": data.num_classes, "channels": data.channels, "size": data.size}
    return {"name": name} | shape | splits


def claim(config: ExperimentConfig, out: Path) -> None:
    """Make `out` this experiment's directory; refuse one that holds an experiment with other settings.

    Raises:
        UserError: the settings differ (each one is named), or the directory cannot be written.
    """
    file = out / "experiment.json"
    new = config.model_dump(mode="json")
    if file.exists():
        try:
            old = json.loads(file.read_text())
            old_arms = {arm["name"]: arm for arm in old["arms"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file} is not an experiment: expected JSON; remove it or pass another --out"
            ) from None
        differing = differences(old["run"], new["run"])
        for arm in new["arms"]:
            if arm["name"] in old_arms:
                differing += differences(old_arms[arm["name"]], arm, f"arm {arm['name']}: ", skip=("lrs",))
        if differing:
            raise UserError(
                f"{out} holds another experiment ({'; '.join(differing)}): pass another --out or remove it"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, new)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write to {out}: {reason}; pass an --out directory that is writable"
        ) from None


def differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = "", skip: Sequence[str] = ()
) -> list[str]:
    """Fields that differ, as "field was old, now new".

    Example:
        >>> differences({"epochs": 3}, {"epochs": 5, "data": "digits"})
        ["data was not set, now 'digits'", 'epochs was 3, now 5']
    """
    words = []
    for key in sorted(old.keys() | new.keys()):
        if key not in skip and (key not in old or key not in new or old[key] != new[key]):
            was = repr(old[key]) if key in old else "not set"
            now = repr(new[key]) if key in new else "not set"
            words.append(f"{prefix}{key} was {was}, now {now}")
    return words


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_experiment(file: Path) -> ExperimentConfig:
    """An experiment from a file: what `claim` left in a directory, or one that somebody wrote.

    Args:
        file: YAML (JSON is YAML, too) with the fields of `ExperimentConfig`.

    Returns:
        The experiment.

    Raises:
        UserError: no such file, or not an experiment.
    """
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{file}: no experiment there; start one with `nfnets compare --out …`") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not YAML ({' '.join(str(error).split())}); expected an experiment"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: expected the fields of an experiment, such as run, arms, seeds, lrs")
    return ExperimentConfig.create(**fields)
