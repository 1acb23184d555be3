"""What is to be seen of an experiment's arms: the conversion plan, and the signal before and after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from nfnets.convert import Plan, plan
from nfnets.signal import SignalReport, plotlyjs, profile
from nfnets.signal.report import merge_reports
from nfnets.state_dicts import load_state
from nfnets.train.compare.protocol import ExperimentConfig, Trial
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.loop import engine
from nfnets.train.loop.arm import arm_model, converted, first_images, original
from nfnets.train.loop.folder import EMA, MODEL, finished, lost

# Enough samples for channel moments that do not jump, few enough to be free.
PROFILED = 64


class Inspected(NamedTuple):
    """An arm at initialization."""

    name: str
    plan: Plan | None
    """None: nothing is converted."""
    model: nn.Module


def arm_runs(config: ExperimentConfig) -> dict[str, RunConfig]:
    """Every arm's first run, by arm."""
    first = config.first_run()
    found = {}
    for trial in config.finals({(a.name, b): config.lrs[0] for a in config.arms for b in config.batch_sizes}):
        found.setdefault(trial.arm, config.run_config(trial))
    return {name: run.model_copy(update={"batch_size": first.batch_size}) for name, run in found.items()}


def arms(config: ExperimentConfig, data: Data) -> Iterator[Inspected]:
    """Every arm as it starts, by the plan and the model of its first run."""
    for name, run in arm_runs(config).items():
        model, found = original(run, data), None
        if run.method != "bn":
            options: dict[str, Any] = dict(run.method_options)
            found = plan(model, first_images(run, data), method=run.method, **options)
        yield Inspected(name, found, converted(model, run, data))


def plan_rows(inspected: Sequence[Inspected]) -> dict[str, list[dict[str, str]]]:
    """The plans of what is converted for `results.json`: the public columns of every row, as text."""
    names = ("path", "role", "action", "replaced", "reason")
    return {
        arm.name: [{name: str(getattr(row, name) or "") for name in names} for row in arm.plan]
        for arm in inspected
        if arm.plan is not None
    }


def signal_at_start(config: ExperimentConfig, data: Data, inspected: Sequence[Inspected]) -> SignalReport:
    """The signal report of all arms at initialization, on training images of the first seed's run."""
    return profile({arm.name: arm.model for arm in inspected}, images_for(config, data))


def images_for(config: ExperimentConfig, data: Data) -> Tensor:
    """The training images that every signal report of an experiment is measured on."""
    size = min(PROFILED, len(data.train))
    return first_images(config.first_run().model_copy(update={"batch_size": size, "accumulation": 1}), data)


def signal_in_run(run: RunConfig, folder: Path, data: Data, images: Tensor, name: str) -> SignalReport | None:
    """One run's signal before its first and after its last step, on the same images.

    Args:
        run: Its configuration.
        folder: Where its result and its model lie.
        data: Its data set.
        images: To measure on.
        name: What the report calls the model.

    Returns:
        A report of two steps, or None where the run diverged and left no weights, or somebody deleted them and the
        checkpoints.
    """
    result = finished(folder, run)
    if result is None or result["status"] != "done":
        return None
    if lost(folder, run, result):
        engine.run(run, folder, test=False)  # writes them again, where it can
        if lost(folder, run, result):
            return None
    model = arm_model(run, data)
    start = profile({name: model}, images)
    weights = folder / EMA if (folder / EMA).is_file() else folder / MODEL
    load_state(model, weights)
    end = profile({name: model}, images)
    end.points = [replace(point, step=result["steps"]) for point in end.points]
    return merge_reports([start, end])


def signals_of_runs(config: ExperimentConfig, data: Data, results: dict[str, Any], out: Path) -> SignalReport:
    """Write every arm's signal before and after training next to its run, and all of them after it to `out`.

    The run of the first seed stands for its arm and batch size. What is there already is read back.

    Args:
        config: The experiment.
        data: Its data set.
        results: The content of `results.json`.
        out: The experiment's directory.

    Returns:
        The report after training, of every arm at every batch size.
    """
    images = images_for(config, data)
    several = len(config.batch_sizes) > 1
    ends = []
    for run in results["runs"]:
        if not run["final"] or run["seed"] != config.seeds[0]:
            continue
        trial = Trial(run["arm"], run["batch_size"], run["lr"], run["seed"])
        folder = out / run["folder"]
        name = f"{trial.arm}, batch {trial.batch_size}" if several else trial.arm
        if (folder / "signal.json").is_file():
            report = SignalReport.from_json(folder / "signal.json")
        else:
            report = signal_in_run(config.run_config(trial), folder, data, images, name)
            if report is None:
                continue
            save_signal(report, folder, shared=out)
        last = report.steps[-1]
        ends.append(SignalReport([replace(p, model=name, step=0) for p in report.points if p.step == last]))
    after = merge_reports(ends)
    if after.points:
        save_signal(after, out, "signal-after")
    return after


def save_signal(report: SignalReport, out: Path, name: str = "signal", shared: Path | None = None) -> None:
    """`<name>.json` (which pages are made from) and `<name>.html` in `out`; all share plotly.js by one file."""
    report.to_json(out / f"{name}.json")
    report.to_html(out / f"{name}.html", plotlyjs=(shared or out) / plotlyjs.NAME)
