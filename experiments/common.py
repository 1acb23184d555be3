"""What the experiments share: a sweep that says how far it is, numbers out of its results, the figures' style."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nfnets import files
from nfnets.signal.figure import COLORS, MARKERS
from nfnets.train import RunConfig
from nfnets.train import run as train
from nfnets.train.compare import Event, ExperimentConfig, choose, run_experiment
from nfnets.train.compare.experiment import write_json
from nfnets.train.compare.statistics import Interval, paired_difference
from nfnets.train.compare.workers import server
from nfnets.train.hardware import hardware, versions

TUNING_SEED = 100
SEEDS = (0, 1, 2)


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    """The options that every experiment has; its module's first line says what it is."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(out), help="what is there already is read back")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    return parser


def more_evidence(parser: argparse.ArgumentParser, seeds: int) -> None:
    """The options of experiments whose verdict hangs on few validation images and seeds."""
    parser.add_argument("--seeds", type=int, default=seeds, help="reported; from 0")
    parser.add_argument("--validation", type=int, metavar="IMAGES", help="held out; default: a tenth")


def limits(images: int, validation: int | None) -> dict[str, Any]:
    """`train_limit` and `validation_fraction` that hold out `validation` images beside the 90 % of `images` that are
    trained on; None: the other tenth."""
    if validation is None:
        return {"train_limit": images}
    total = round(0.9 * images) + validation
    return {"train_limit": total, "validation_fraction": validation / total}


def sweep(config: ExperimentConfig, out: Path, command: str, jobs: int) -> dict[str, Any]:
    """`run_experiment` with a line for each finished run."""
    return run_experiment(config, out, watch=_say, command=command, jobs=jobs)


def _say(event: Event) -> None:
    if event.kind == "end":
        print(f"{event.trial.folder}: validation {event.row['val_accuracy']}", flush=True)


Cell = tuple[dict[str, Any], RunConfig, Path]
"""What tells one run from the others, the run, its folder."""


def validate(grid: Sequence[Cell], out: Path, command: str, jobs: int) -> list[dict[str, Any]]:
    """Train a grid, `jobs` runs at once (0: here), for their accuracies on the validation images alone.

    A run that diverged counts as chance, of ten classes; a folder's finished run is read back.

    Returns:
        What tells each run from the others with its `val_accuracy`: the `runs` of the `results.json` that is written.
    """
    workers = processes(jobs) if jobs else None
    with workers or nullcontext():
        work = workers.map if workers else map
        configs, folders = zip(*((config, folder) for _, config, folder in grid), strict=True)
        runs = []
        for (row, _, _), accuracy in zip(grid, work(_validation_accuracy, configs, folders), strict=True):
            runs.append(row | {"val_accuracy": accuracy})
            print(*runs[-1].values(), flush=True)
    about = {"command": command, "versions": versions(), "hardware": hardware(torch.device("cpu"))}
    write_json(out / "results.json", about | {"runs": runs})
    return runs


def processes(jobs: int) -> ProcessPoolExecutor:
    """So many, none of which inherits this one's threads."""
    return ProcessPoolExecutor(jobs, server())


def _validation_accuracy(config: RunConfig, folder: Path) -> float:
    return train(config, folder, test=False).get("val_accuracy") or 0.1


def grouped(runs: Iterable[dict[str, Any]], *names: str) -> dict[Any, list[float]]:
    """Validation accuracies by the values of these fields, in the order of their first run."""
    found: dict[Any, list[float]] = {}
    for run in runs:
        key = tuple(run[name] for name in names)
        found.setdefault(key if len(names) > 1 else key[0], []).append(run["val_accuracy"])
    return found


_READ = "Accuracy is the mean ± standard deviation over seeds; [ ] is the 95 % interval of a difference, in points."


def conclude(out: Path, command: str, about: str | None, text: str) -> None:
    """Print the verdict and leave it beside the results: what was asked (a docstring), the command, how to read it."""
    out.mkdir(parents=True, exist_ok=True)
    question = (about or "").partition("\n")[0].rstrip(".")
    read = f"{_READ}\n\n" if " ± " in text else ""
    files.write(out / "verdict.md", f"# {question}\n\n    {command}\n\n{read}{text}\n")
    print(text, flush=True)


def accuracies(results: dict[str, Any], arm: str, batch_size: int, split: str = "test") -> list[float]:
    """One arm's reported accuracies, seed by seed; a diverged run counts as chance."""
    chance = 1.0 / results["data"]["num_classes"]
    finals = [r for r in results["runs"] if r["final"] and (r["arm"], r["batch_size"]) == (arm, batch_size)]
    return [
        r[f"{split}_accuracy"] if r["status"] == "done" else chance
        for r in sorted(finals, key=lambda r: r["seed"])
    ]


def compared(a: Sequence[float], b: Sequence[float]) -> str:
    """The paired difference a − b of accuracies, in points, for a Markdown table.

    Example:
        >>> compared([0.93, 0.95, 0.94], [0.92, 0.93, 0.93])
        '+1.33 [−0.10, +2.77]'
        >>> compared([0.1, 0.1], [0.1, 0.1])
        'the same'
    """
    return points(paired_difference(a, b))


def points(d: Interval) -> str:
    """An interval of a difference in percentage points; bold where it leaves out zero."""
    if d.low == d.high:  # arms that are one run, or stay at chance whatever the seed: no estimate
        return "the same" if d.mean == 0 else f"{100 * d.mean:+.2f}, no spread".replace("-", "−")
    text = f"{100 * d.mean:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]".replace("-", "−")
    return f"**{text}**" if d.low > 0 or d.high < 0 else text


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in percent; of one seed its value.

    Example:
        >>> percent([0.93, 0.95, 0.94]), percent([0.93])
        ('94.00 ± 1.00', '93.00')
    """
    mean = f"{100 * sum(values) / len(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * float(np.std(values, ddof=1)):.2f}"


def markdown(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def panels(columns: int = 1, width: float = 6.4, height: float = 4.0, **shared: Any) -> tuple[Figure, Any]:
    """A figure with a row of panels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **shared)[0]
    for axis in axes:
        axis.grid(color="0.9", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def band(
    axis: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], number: int, label: str, **style: Any
) -> None:
    """A line through the means over seeds, with a band from the lowest to the highest seed.

    Args:
        axis: Where to draw.
        x: Places on the axis.
        seeds: For each place the values over seeds.
        number: Of the line in its figure: chooses color and marker.
        label: In the legend.
        **style: of the line.
    """
    color = COLORS[number % len(COLORS)]
    given = {"marker": MARKERS[number % len(MARKERS)], "ms": 4.5, "linewidth": 1.5} | style
    if number >= len(COLORS):
        given.setdefault("linestyle", "--")
    axis.plot(x, [float(np.mean(s)) for s in seeds], color=color, label=label, **given)
    axis.fill_between(x, [min(s) for s in seeds], [max(s) for s in seeds], color=color, alpha=0.13, lw=0)


def percent_axis(axis: Axes, label: str) -> None:
    """Accuracies in percent on the vertical axis."""
    axis.set_ylabel(label)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def save(figure: Figure, path: Path) -> None:
    """As a PNG of publishable resolution."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"savefig.dpi": 160}):
        files.write(path, figure.savefig)


Run = Callable[[str, float, int, bool], dict[str, Any]]
"""(arm, learning rate, seed, whether the test split may be read) to `val_accuracy`, `test_accuracy` and what else."""


def search(
    run: Run,
    arms: Sequence[str],
    lrs: Sequence[float],
    out: Path,
    jobs: int,
    seeds: Sequence[int] = SEEDS,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The protocol of `nfnets compare` for what is not one training run: equal searches, then paired seeds.

    Args:
        run: A function at a module's top, or a `partial` of one, so that other processes can call it.
        arms: Its first argument; the first one is the baseline.
        lrs: Tried with the tuning seed; the best on validation data is reported with every seed.
        out: Where each run's result is kept; finished ones are read back.
        jobs: Processes at once; 0 runs all here.
        seeds: Reported.
        about: Further entries of `results.json`.

    Returns:
        What `accuracies` reads, as in the `results.json` that is written.
    """
    folder = out / "runs"
    folder.mkdir(parents=True, exist_ok=True)

    def note(file: Path, result: dict[str, Any]) -> None:
        write_json(file, result)
        print(f"{file.stem}: validation {result['val_accuracy']:.4f}", flush=True)

    def perform(asked: Sequence[tuple[str, float, int, bool]]) -> dict[tuple[str, float, int, bool], Any]:
        files = {key: folder / f"{key[0]}-lr{key[1]:g}-s{key[2]}.json" for key in asked}
        missing = [key for key in asked if not files[key].exists()]
        if not jobs:
            for key in missing:
                note(files[key], run(*key))
        else:
            workers = processes(jobs)
            try:
                waiting = {workers.submit(run, *key): files[key] for key in missing}
                for future in as_completed(waiting):
                    note(waiting[future], future.result())
            finally:  # interrupted, what has not begun is left for the next time
                workers.shutdown(cancel_futures=True)
        return {key: json.loads(file.read_text()) for key, file in files.items()}

    tried = perform([(arm, lr, TUNING_SEED, False) for arm in arms for lr in lrs])
    chosen = {arm: choose((key[1], tried[key]) for key in tried if key[0] == arm) for arm in arms}
    final = perform([(arm, chosen[arm], seed, True) for seed in seeds for arm in arms])
    runs = [
        {"arm": key[0], "batch_size": 0, "lr": key[1], "seed": key[2], "final": key[3]} | result
        for key, result in (tried | final).items()
    ]
    machine = hardware(torch.device("cpu"))
    results = {
        "experiment": {
            "arms": list(arms),
            "lrs": list(lrs),
            "seeds": list(seeds),
            "tuning_seeds": [TUNING_SEED],
        },
        "data": {"num_classes": 10},
        "chosen": [{"arm": arm, "lr": lr} for arm, lr in chosen.items()],
        "runs": runs,
        "versions": versions(),
        "hardware": machine,
    } | (about or {})
    write_json(out / "results.json", results)
    return results
