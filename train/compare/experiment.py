"""Running a comparison: what is left of the sweep, one run after the other, into `results.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nfnets import files
from nfnets.errors import UserError
from nfnets.plain import is_file, read_json, read_yaml, shown
from nfnets.train import hardware
from nfnets.train.compare import workers
from nfnets.train.compare.protocol import ExperimentConfig, Trial
from nfnets.train.compare.workers import Task
from nfnets.train.config import RunConfig
from nfnets.train.data import Data, load
from nfnets.train.loop.folder import RESULT, finished, untested

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
    "unreadable",
)
FROM_TEST = ("test_accuracy", "test_loss", "ece", "reliability")
_OPENS_FILES = frozenset({"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "trust_remote_code"})


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
    patient: bool = True,
) -> dict[str, Any]:
    """Run the whole sweep, or what is left of it, and write `<out>/results.json`.

    Runs live in `<out>/runs/<arm>-b<batch>-lr<lr>-s<seed>/`. Finished ones are read back, an open one resumes
    from its checkpoint. Arms, seeds, batch sizes and learning rates may be added to a finished experiment.

    A search's runs leave the test split alone; it is read once the search has chosen, for what is reported.

    Several processes, also on several machines over one file system with locks, may run the same experiment in
    the same directory, and so may `torchrun`'s ranks: each takes runs that nobody holds, none is run twice, and
    all end with the same results.

    Args:
        config: The experiment.
        out: Its directory, created if need be.
        watch: Called with an `Event` when a run begins, after each step, and when it ends.
        command: The command line that reproduces the experiment, for the report.
        about: More entries for `results.json` (conversion plans, …).
        data: The data set, if it is at hand; else it is loaded to know its sizes.
        jobs: Runs at once, each in a process of its own; 0 runs them one by one in this process.
        patient: Wait for runs that other processes hold; else return when none but those is left.

    Returns:
        The content of `results.json`: everything that the report needs beside the JSONL logs.

    Raises:
        UserError: `out` holds another experiment, cannot be written, or a configuration is impossible.
        KeyboardInterrupt: after the open run's state was saved and `results.json` written with what there is.
    """
    config = settled(config, out)
    data = load(config.first_run()) if data is None else data
    largest = max(config.batch_sizes)
    if largest > len(data.train):
        raise UserError(
            f"batch size {largest}: expected at most {len(data.train)}, the training images (others are held out to "
            f"validate and test); pass batch_size={len(data.train)} or less"
        )
    claim(config, out)
    records: dict[Trial, dict[str, Any]] = {}

    def ready() -> list[Task]:
        """What may start now; what other processes have finished meanwhile is taken in first."""
        while True:
            reported = set(config.finals(config.rates(records)))
            left = [
                trial
                for trial in startable(config, records)
                if trial not in records or (trial in reported and untested(records[trial]))
            ]
            found = {
                trial: result for trial in left if (result := read_back(trial, trial in reported)) is not None
            }
            if not found:
                return [task_of(trial, trial in reported) for trial in left]
            for trial, result in found.items():
                over(trial, result)

    def read_back(trial: Trial, tested: bool) -> dict[str, Any] | None:
        folder = out / "runs" / trial.folder
        if not (folder / RESULT).is_file():
            return None
        return finished(folder, config.run_config(trial), tested=tested)

    trials: dict[Path, Trial] = {}

    def task_of(trial: Trial, test: bool) -> Task:
        folder = out / "runs" / trial.folder
        trials[folder] = trial
        return Task(config.run_config(trial), folder, test)

    def begin(task: Task) -> None:
        if trials[task.folder] not in records:  # else it is only tested
            tell("begin", trials[task.folder], {})

    def on_row(task: Task, row: dict[str, Any]) -> None:
        tell("step", trials[task.folder], row)

    def over(trial: Trial, result: dict[str, Any]) -> None:
        trained = trial not in records
        records[trial] = result
        if trained:
            tell("end", trial, result)

    def tell(kind: Literal["begin", "step", "end"], trial: Trial, row: dict[str, Any]) -> None:
        if watch is not None:
            watch(Event(kind, trial, row))

    def save() -> dict[str, Any]:
        results = collect(config, data, records)
        results |= {"command": command, "jobs": jobs} | (about or {})
        write_json(out / "results.json", results)
        return results

    with workers.alone():
        try:
            if jobs:
                performed = workers.apart(ready, begin, on_row, jobs, patient)
            else:
                performed = workers.here(ready, begin, on_row, patient)
            for task, result in performed:
                over(trials[task.folder], result)
                save()
        except (KeyboardInterrupt, SystemExit):
            save()
            raise
    return save()


def startable(config: ExperimentConfig, records: dict[Trial, dict[str, Any]]) -> list[Trial]:
    """The searches' runs, then the reported ones whose rate is known: all that are over or may start now."""
    searched = [trial for search in config.searches().values() for trial in search]
    return list(dict.fromkeys([*searched, *config.finals(config.rates(records))]))


def collect(config: ExperimentConfig, data: Data, records: dict[Trial, dict[str, Any]]) -> dict[str, Any]:
    """`results.json` from the runs that there are. Test numbers are kept for reported runs only.

    Runs stand in the protocol's order, whichever process finished first.
    """
    chosen = config.rates(records)
    finals = set(config.finals(chosen))
    planned = startable(config, records)
    there = [trial for trial in planned if trial in records]
    runs = []
    for trial in there:
        result = records[trial]
        keys = REPORTED + (FROM_TEST if trial in finals else ())
        runs.append(
            asdict(trial)
            | {"folder": f"runs/{trial.folder}", "final": trial in finals}
            | {"total_steps": total_steps(config.run_config(trial), data)}
            | {key: _finite(result.get(key)) for key in keys}
            | {"diverged_at": result.get("diverged_at")}
            | {"config": config.run_config(trial).model_dump(mode="json")}
        )
    results = [records[trial] for trial in there]
    return {
        "format": FORMAT,
        "experiment": config.model_dump(mode="json"),
        "tuning_seeds": list(config.tuned_with),
        "data": describe(config.first_run().data, data),
        "chosen": [{"arm": arm, "batch_size": b, "lr": lr} for (arm, b), lr in chosen.items()],
        "runs": runs,
        "complete": len(there) == len(planned)
        and len(chosen) == len(config.searches())
        and not any(trial in finals and untested(records[trial]) for trial in there),
        "versions": results[0].get("versions", {}) if results else {},
        "hardware": results[0].get("hardware", {}) if results else {},
        "machines": _distinct(result.get("hardware", {}) for result in results),
    }


def _distinct(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for entry in entries:
        if entry not in found:
            found.append(entry)
    return found


def total_steps(config: RunConfig, data: Data) -> int:
    """Optimizer steps of a run: whole batches only, `epochs` times."""
    return config.epochs * (len(data.train) // config.batch_size)


def describe(name: str, data: Data) -> dict[str, Any]:
    """The data set's sizes, for the report."""
    splits = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
    shape = {"num_classes": data.num_classes, "channels": data.channels, "size": data.size}
    return {"name": name} | shape | splits


def settled(config: ExperimentConfig, out: Path) -> ExperimentConfig:
    """The experiment with its runs' threads and device, on which the last bits depend.

    They are what is asked for; else what the experiment in `out` began with; else OMP_NUM_THREADS or one thread, and a
    GPU where there is one. How many runs there are at once, and who trains them, says nothing of either.

    Args:
        config: The experiment.
        out: Its directory; it need not be there.

    Example:
        >>> arms = [{"name": "bn", "method": "bn"}]
        >>> settled(ExperimentConfig.create(arms=arms, run={"threads": 2, "device": "cpu"}), Path("none")).run
        {'threads': 2, 'device': 'cpu'}
    """
    open_ = {"threads": hardware.default_threads(), "device": hardware.resolve("auto").type}
    run = open_ | _begun(out) | _recorded(config.run)
    return config.model_copy(update={"run": run})


def _begun(out: Path) -> dict[str, Any]:
    """Threads and device of the experiment in a directory; `claim` refuses what is none."""
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        there = json.loads((out / "results.json").read_text(encoding="utf-8"))["hardware"]
        found["threads"] = there["threads"]  # of before the experiment had them
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        run = _recorded(json.loads((out / "experiment.json").read_text(encoding="utf-8"))["run"])
        found |= {name: run[name] for name in ("threads", "device") if name in run}
    return found


def _recorded(run: dict[str, Any]) -> dict[str, Any]:
    """The fields without open threads and an open device."""
    unset = {"threads": None, "device": "auto"}
    return {name: value for name, value in run.items() if name not in unset or value != unset[name]}


def claim(config: ExperimentConfig, out: Path) -> None:
    """Make `out` this experiment's directory; refuse one that holds an experiment with other settings.

    Raises:
        UserError: the settings differ (each one is named), or the directory cannot be written.
    """
    file = out / "experiment.json"
    config = settled(config, out)
    new = config.model_dump(mode="json")
    if file.exists():
        old = read_json(file, "an experiment; remove it or pass another --out")
        try:
            # Of before these were recorded: its finished runs tell them, and are asked one by one.
            old_run = {name: new["run"][name] for name in ("threads", "device")} | _recorded(dict(old["run"]))
            old_arms = {arm["name"]: dict(arm) for arm in old["arms"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file} is not an experiment: it has no run and arms; remove it or pass another --out"
            ) from None
        differing = differences(old_run, new["run"])
        for arm in new["arms"]:
            if arm["name"] in old_arms:
                differing += differences(old_arms[arm["name"]], arm, f"arm {arm['name']}: ", skip=("lrs",))
        if differing:
            raise UserError(
                f"{out} holds another experiment ({'; '.join(differing)}): pass another --out or remove it"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write to {out}: {reason}; pass an --out directory that is writable"
        ) from None
    write_json(file, new)


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
    files.write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_experiment(file: Path, trusted: str = "") -> ExperimentConfig:
    """An experiment from a file: what `claim` left in a directory, or one that somebody wrote.

    A file does not decide what code runs: a model of its own ("package.module:function") must be `trusted`.

    Args:
        file: YAML (JSON is YAML, too) with the fields of `ExperimentConfig`.
        trusted: the one function that the file may name as a model, as "package.module:function".

    Returns:
        The experiment.

    Raises:
        UserError: no such file, not an experiment, or code that is not trusted.
    """
    if not is_file(file):
        raise UserError(f"{file}: no experiment there; start one with `nfnets compare --out …`")
    fields = read_yaml(file, "an experiment in YAML: fields such as run, arms, seeds, lrs")
    try:
        config = ExperimentConfig.create(**fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    for given in (config.run, *(arm.fields for arm in config.arms)):
        _must_name_no_code(file, given, trusted)
    return config


def _must_name_no_code(file: Path, fields: dict[str, Any], trusted: str) -> None:
    model = str(fields.get("model", ""))
    family, colon, _ = model.partition(":")
    if colon and family not in ("timm", "torchvision") and model != trusted:
        raise UserError(
            f"{file}: names code to run, model={model}; read that function, and allow it with --model {model}"
        )
    options: dict[str, Any] = {}
    for given in map(fields.get, ("model_options", "data_options")):
        options |= given if isinstance(given, dict) else {}  # else `RunConfig` refuses it
    for name in sorted(_OPENS_FILES & options.keys()):  # of timm; older versions unpickle what they name
        raise UserError(
            f"{file}: {name}={shown(options[name])} may run code; expected init_from or nothing in its place"
        )
