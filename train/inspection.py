"""What is known of an experiment's arms before they train: the conversion plan and the signal at initialization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nfnets.convert import plan
from nfnets.signal import SignalReport, profile
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.models import arm_model, first_images
from nfnets.train.protocol import ExperimentConfig

# Enough samples for channel moments that do not jump, few enough to be free.
PROFILED = 64


def arm_runs(config: ExperimentConfig) -> dict[str, RunConfig]:
    """Every arm's first run, by arm."""
    first = config.first_run()
    found = {}
    for trial in config.finals({(a.name, b): config.lrs[0] for a in config.arms for b in config.batch_sizes}):
        found.setdefault(trial.arm, config.run_config(trial))
    return {name: run.model_copy(update={"batch_size": first.batch_size}) for name, run in found.items()}


def conversion_plans(config: ExperimentConfig, data: Data) -> dict[str, Any]:
    """The plan of every arm that is converted, by arm, as `nfnets.plan` gives it."""
    plans = {}
    for name, run in arm_runs(config).items():
        if run.method != "bn":
            model = arm_model(run.model_copy(update={"method": "bn", "method_options": {}}), data)
            options: dict[str, Any] = dict(run.method_options)
            plans[name] = plan(model, first_images(run, data), method=run.method, **options)
    return plans


def plan_rows(plans: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Plans for `results.json`: the public columns of every row, as text."""
    names = ("path", "role", "action", "replaced", "reason")
    return {
        arm: [{name: str(getattr(row, name) or "") for name in names} for row in rows]
        for arm, rows in plans.items()
    }


def signal_at_start(config: ExperimentConfig, data: Data) -> SignalReport:
    """The signal report of all arms at initialization, on training images of the first seed's run."""
    models: dict[str, nn.Module] = {}
    images = None
    for name, run in arm_runs(config).items():
        models[name] = arm_model(run, data)
        if images is None:
            size = min(PROFILED, len(data.train))
            images = first_images(run.model_copy(update={"batch_size": size, "accumulation": 1}), data)
    return profile(models, images)


def save_signal(report: SignalReport, out: Path) -> None:
    """`signal.json` (which the page is made from) and `signal.html` in `out`."""
    report.to_json(out / "signal.json")
    report.to_html(out / "signal.html")
