"""The comparison as one page: self-contained, offline, readable without JavaScript, in light and dark."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from nfnets.train import comparison, comparison_figures
from nfnets.train.comparison_template import TEMPLATE
from nfnets.train.protocol import SWEPT


@dataclass(frozen=True)
class Picture:
    """A figure: interactive with JavaScript, its PNG without."""

    html: str
    png: str
    """A data URI, "" where there is no static version."""
    alt: str


def page(results: dict[str, Any], out: Path, signal_html: str = "") -> str:
    """The whole comparison as HTML.

    Args:
        results: The content of `results.json`.
        out: The experiment's directory: the logs and PNGs are read there.
        signal_html: Panels of a signal report that need plotly.js on the page, "" for none.

    Returns:
        One HTML document that requests nothing.
    """
    experiment = results["experiment"]
    table = comparison.rows(results)
    verdicts = comparison.verdicts(results, table)
    courses = comparison_figures.curves(results, out)
    baseline, *others = [arm["name"] for arm in experiment["arms"]]
    searches = len(experiment["lrs"]) > 1
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
        verdicts=verdicts,
        headings=comparison.HEADINGS,
        rows=[(comparison_figures.color_of(results, row.arm), comparison.cells(row)) for row in table],
        caption=comparison.caption(results),
        curves=_picture("curves", comparison_figures.plotly_curves(results, courses), out / "curves.png"),
        accuracy_png=_data_uri(out / "accuracy.png"),
        accuracy_width=_width(out / "accuracy.png"),
        search=_picture("search", comparison_figures.plotly_search(results), None) if searches else None,
        searched=comparison_figures.searched(results),
        signal=signal_html,
        plans=results.get("plans", {}),
        plan_columns=("path", "role", "action", "replaced", "reason"),
        settings=settings(results),
        runs=[_run_cells(run) for run in results["runs"]],
        run_headings=RUN_HEADINGS,
        versions=results["versions"],
        hardware=results["hardware"],
        command=results["command"],
        raw=json.dumps(results["experiment"], indent=2),
        plotlyjs=get_plotlyjs(),
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
    return (
        run["arm"],
        str(run["batch_size"]),
        f"{run['lr']:g}",
        str(run["seed"]),
        status,
        number("val_accuracy", 100),
        number("test_accuracy", 100) if run["final"] else "not read: search only",
        number("ece", 1, 3),
        str(run["steps"]),
        number("train_seconds", 1, 1),
    )


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
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]},
    )
    return Picture(html, _data_uri(png) if png else "", name)


def _width(png: Path) -> int:
    """The width of a 150 dpi PNG in CSS pixels (96 to the inch); a PNG says its own at byte 16."""
    return round(int.from_bytes(png.read_bytes()[16:20], "big") * 96 / 150) if png.exists() else 0


def _data_uri(png: Path) -> str:
    if not png.exists():
        return ""
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()
