"""The comparison as one page: self-contained, offline, readable without JavaScript, in light and dark."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import plotly.graph_objects as go

from nfnets.signal import plotlyjs
from nfnets.train.compare import summary
from nfnets.train.compare.page import calibration, figures, plots, times
from nfnets.train.compare.page.figures import Curve
from nfnets.train.compare.page.template import TEMPLATE
from nfnets.train.compare.protocol import SWEPT, rate
from nfnets.train.compare.summary import Summary


@dataclass(frozen=True)
class Picture:
    """A figure: drawn from JSON with JavaScript, its PNG without."""

    html: str
    png: str
    """A data URI, "" where there is no static version."""
    alt: str


@dataclass(frozen=True)
class Signal:
    """A signal report as the page shows it."""

    panels: str
    """HTML that needs plotly.js on the page."""
    png: str
    """A data URI for readers without JavaScript."""
    file: str
    """The whole report, relative to the page; "" where there is none."""


def page(found: Summary, out: Path, courses: Sequence[Curve], signals: dict[str, Signal]) -> str:
    """The whole comparison as HTML.

    Args:
        found: What it says.
        out: The experiment's directory: the logs and PNGs are read there.
        courses: Of the reported runs.
        signals: Signal reports by what they show.

    Returns:
        One HTML document that requests nothing.
    """
    results, experiment = found.results, found.results["experiment"]
    baseline, *others = [arm["name"] for arm in experiment["arms"]]
    searches = len(experiment["lrs"]) > 1
    diagram = plots.plotly_reliability(results)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        title=f"{' and '.join(others) or baseline} against {baseline} on {results['data']['name']}"
        if others
        else f"{baseline} on {results['data']['name']}",
        results=results,
        model=results["runs"][0]["config"]["model"],
        experiment=experiment,
        data=results["data"],
        baseline=baseline,
        verdicts=found.verdicts,
        headings=summary.HEADINGS,
        rows=[(plots.color_of(results, row.arm), summary.cells(row)) for row in found.rows],
        caption=summary.caption(found),
        curves=_picture("curves", plots.plotly_curves(results, courses), out / "curves.png"),
        accuracy=_picture("accuracy", plots.plotly_accuracy(results, found.rows), out / "accuracy.png"),
        search=_picture("search", plots.plotly_search(results), None) if searches else None,
        searched=figures.searched(results),
        rate=rate,
        tuned_with=summary.seeds_in_words(results["tuning_seeds"]),
        reliability=None if diagram is None else _picture("reliability", diagram, None),
        calibration_headings=calibration.HEADINGS,
        calibration=calibration.rows(results),
        time_headings=times.HEADINGS,
        times=[times.cells(entry) for entry in times.times(results, out)],
        cost_headings=summary.COST_HEADINGS,
        costs=summary.cost_cells(results),
        signals=signals,
        plans=results.get("plans", {}),
        plan_columns=("path", "role", "action", "replaced", "reason"),
        settings=settings(results),
        runs=[(_run_cells(run), _files(out, run["folder"])) for run in results["runs"]],
        run_headings=RUN_HEADINGS,
        versions=results["versions"],
        machines=results.get("machines") or [results["hardware"]],
        command=results["command"],
        raw=json.dumps(results["experiment"], indent=2),
        plotlyjs=plotlyjs.packed(),
        then=plotlyjs.THEN,
    )


RUN_HEADINGS = (
    "arm",
    "batch",
    "lr",
    "seed",
    "status",
    "val. accuracy",
    "test accuracy",
    "ECE",
    "steps",
    "seconds",
)


def _run_cells(run: dict[str, Any]) -> tuple[str, ...]:
    def number(key: str, scale: float = 1.0, digits: int = 2) -> str:
        value = run.get(key)
        return "–" if value is None or not math.isfinite(value) else f"{scale * value:.{digits}f}"

    status = run["status"]
    if run["diverged_at"] is not None:
        status += f" at step {run['diverged_at']}"
    if unreadable := (run.get("unreadable") or {}).get("count", 0):
        status += f", {unreadable} unreadable image{'s' if unreadable > 1 else ''} left out"
    return (
        run["arm"],
        str(run["batch_size"]),
        rate(run["lr"]),
        str(run["seed"]),
        status,
        number("val_accuracy", 100),
        number("test_accuracy", 100) if run["final"] else "not read: search only",
        number("ece", 1, 3),
        str(run["steps"]),
        number("train_seconds", 1, 1),
    )


# What a run's folder may hold, and how the page calls it.
FILES = (
    ("config.json", "settings"),
    ("log.jsonl", "log"),
    ("result.json", "result"),
    ("signal.html", "signal"),
    ("signal.json", "signal data"),
)


def _files(out: Path, folder: str) -> list[tuple[str, str]]:
    """The files of a run that are there, as (path relative to the page, word)."""
    return [(f"{quote(folder)}/{name}", word) for name, word in FILES if (out / folder / name).is_file()]


@dataclass(frozen=True)
class Setting:
    """One field of the configuration, with its value in every arm."""

    key: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether the arms differ in it."""
        return len(set(self.values)) > 1


def settings(results: dict[str, Any]) -> tuple[list[str], list[Setting]]:
    """The arms' names, and every setting with its value per arm."""
    of_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for run in results["runs"]:
        of_arm.setdefault(run["arm"], {}).setdefault(run["batch_size"], run["config"])
    names = [arm["name"] for arm in results["experiment"]["arms"] if arm["name"] in of_arm]
    keys = [key for key in results["runs"][0]["config"] if key not in SWEPT]

    def value(name: str, key: str) -> str:
        by_batch = {size: _text(config[key]) for size, config in sorted(of_arm[name].items())}
        if len(set(by_batch.values())) == 1:
            return next(iter(by_batch.values()))
        return ", ".join(f"{text} at batch {size}" for size, text in by_batch.items())

    return names, [Setting(key, tuple(value(name, key) for name in names)) for key in keys]


def _text(value: Any) -> str:
    return "–" if value is None or value == {} else json.dumps(value).strip('"')


def _picture(name: str, figure: go.Figure, png: Path | None) -> Picture:
    content = (figure.to_json() or "").replace("<", "\\u003c")  # a name must not end the script
    html = (
        f'<div id="{name}" style="height:{figure.layout.height}px"></div>'
        f'<script type="application/json" data-figure="{name}">{content}</script>'
    )
    return Picture(html, data_uri(png) if png else "", name)


def data_uri(png: Path) -> str:
    if not png.exists():
        return ""
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()
