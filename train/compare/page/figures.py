"""Learning curves and accuracies of a comparison: the numbers, and by matplotlib the figures for papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nfnets import files
from nfnets.signal.figure import COLORS
from nfnets.train.compare.summary import ArmRow, Summary
from nfnets.train.loop.log import steps_and_evaluations

BINS = 100
MEASURES = (("accuracy", "validation accuracy"), ("loss", "training loss"))


@dataclass(frozen=True)
class Curve:
    """One arm's course over the seeds at one batch size: the mean, and the lowest and highest seed."""

    arm: str
    batch_size: int
    measure: str
    epochs: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curves(results: dict[str, Any], out: Path) -> list[Curve]:
    """The courses of the reported runs, from their logs.

    Training loss is averaged over at most 100 equal spans of the budget. Where a seed stops early (it
    diverged) the others go on alone.
    """
    courses: dict[tuple[str, int, str], list[list[tuple[float, float]]]] = {}
    for run in results["runs"]:
        if not run["final"]:
            continue
        steps, evaluations = steps_and_evaluations(out / run["folder"] / "log.jsonl")
        scale = run["config"]["epochs"] / max(1, run["total_steps"])
        accuracy = [(r["step"] * scale, r["accuracy"]) for r in evaluations if r["split"] == "val"]
        loss = [(r["step"] * scale, r["loss"]) for r in steps]
        for measure, points in (("accuracy", accuracy), ("loss", _binned(loss, run["config"]["epochs"]))):
            courses.setdefault((run["arm"], run["batch_size"], measure), []).append(points)
    found = []
    for arm in results["experiment"]["arms"]:
        for batch_size in results["experiment"]["batch_sizes"]:
            for measure, _ in MEASURES:
                merged = _merge(courses.get((arm["name"], batch_size, measure), []))
                if len(merged):
                    found.append(Curve(arm["name"], batch_size, measure, *merged.T))
    return found


def _binned(points: Sequence[tuple[float, float]], epochs: float) -> list[tuple[float, float]]:
    """Means over equal spans, each placed at its span's middle."""
    spans: dict[int, list[float]] = {}
    for x, y in points:
        if y is not None and math.isfinite(y):
            spans.setdefault(min(BINS - 1, int(x / epochs * BINS)), []).append(y)
    return [((b + 0.5) * epochs / BINS, math.fsum(ys) / len(ys)) for b, ys in sorted(spans.items())]


def _merge(courses: Sequence[Sequence[tuple[float, float]]]) -> np.ndarray:
    """Rows of (x, mean, lowest, highest) over the courses that reach x."""
    at: dict[float, list[float]] = {}
    for course in courses:
        for x, y in course:
            if y is not None and math.isfinite(y):
                at.setdefault(round(x, 6), []).append(y)
    return np.array([(x, np.mean(ys), min(ys), max(ys)) for x, ys in sorted(at.items())]).reshape(-1, 4)


def short(arm: str) -> str:
    """An arm's name as a figure has room for it.

    Example:
        >>> short("nf"), short("nf:init_from=runs/pretrained/model.safetensors")
        ('nf', 'nf:init_from=r…fetensors')
    """
    return arm if len(arm) <= 24 else f"{arm[:14]}…{arm[-9:]}"


def color_of(results: dict[str, Any], arm: str) -> str:
    """The arm's color, the same in every figure."""
    names = [entry["name"] for entry in results["experiment"]["arms"]]
    return COLORS[names.index(arm) % len(COLORS)]


def searched(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Per arm and batch size: the learning rate chosen, and what the search saw of each, over its tuning seeds.

    Returns:
        For each search what was `chosen` with `tried`, a list by rate: `accuracies` on the validation images of the
        runs that did not diverge, their mean `val_accuracy` (None: there are none), and how many `diverged`.
    """
    found = []
    for choice in results["chosen"]:
        runs: dict[float, list[dict[str, Any]]] = {}
        for run in results["runs"]:
            if (run["arm"], run["batch_size"]) != (choice["arm"], choice["batch_size"]):
                continue
            if run["seed"] in results["tuning_seeds"]:
                runs.setdefault(run["lr"], []).append(run)
        tried = []
        for lr, there in sorted(runs.items()):
            accuracies = [run["val_accuracy"] for run in there if run["status"] == "done"]
            entry = {"lr": lr, "accuracies": accuracies, "diverged": len(there) - len(accuracies)}
            tried.append(entry | {"val_accuracy": fmean(accuracies) if accuracies else None})
        found.append(choice | {"tried": tried})
    return found


def save_pngs(summary: Summary, out: Path, found: Sequence[Curve]) -> list[Path]:
    """`curves.png` and `accuracy.png` in `out`."""
    pictures = [("curves.png", draw_curves(summary.results, found)), ("accuracy.png", draw_accuracy(summary))]
    with matplotlib.rc_context({"savefig.dpi": 150}):
        for name, figure in pictures:
            files.write(out / name, figure.savefig)
    return [out / name for name, _ in pictures]


def draw_curves(results: dict[str, Any], found: Sequence[Curve]) -> Figure:
    """Validation accuracy and training loss over epochs, a column per batch size."""
    sizes = results["experiment"]["batch_sizes"]
    figure = Figure(figsize=(max(6.4, 3.6 * len(sizes)), 5.6), layout="constrained")
    axes = figure.subplots(2, len(sizes), squeeze=False, sharex="col", sharey="row")
    for curve in found:
        axis = axes[[m for m, _ in MEASURES].index(curve.measure), sizes.index(curve.batch_size)]
        color = color_of(results, curve.arm)
        axis.fill_between(curve.epochs, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
        axis.plot(curve.epochs, curve.mean, color=color, linewidth=1.6, label=short(curve.arm))
    for column, size in enumerate(sizes):
        axes[0, column].set_title(f"batch size {size}", fontsize=11)
        axes[1, column].set_xlabel("epoch")
        axes[1, column].set_yscale("log")
    for line, (_, label) in enumerate(MEASURES):
        axes[line, 0].set_ylabel(label)
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in axes.flat:
        _clean(axis)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        axes[0, 0].legend(handles, labels, frameon=False, loc="lower right")
    seeds = len(results["experiment"]["seeds"])
    figure.supxlabel(
        f"lines: mean over {seeds} seeds; bands: lowest to highest seed", fontsize=8, color="0.4"
    )
    return figure


def draw_accuracy(summary: Summary) -> Figure:
    """Test accuracy of every seed with mean and 95 % interval; against batch size where there are three or more."""
    results, table = summary.results, summary.rows
    sizes = results["experiment"]["batch_sizes"]
    if len(sizes) > 2:
        return _draw_against_batch_size(results, table)
    arms = [arm["name"] for arm in results["experiment"]["arms"]]
    width = max(3.6, 1.1 * len(sizes) * len(arms))
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axis = figure.subplots()
    ticks: list[float] = []
    for row in table:
        x = sizes.index(row.batch_size) * (len(arms) + 0.8) + arms.index(row.arm)
        ticks.append(x)
        _point(axis, x, row, color_of(results, row.arm))
    axis.set_xticks(ticks, [short(row.arm) for row in table])
    for position, size in enumerate(sizes):
        center = position * (len(arms) + 0.8) + (len(arms) - 1) / 2
        axis.text(center, 1.02, f"batch size {size}", transform=axis.get_xaxis_transform(), ha="center")
    axis.set_xlim(-0.7, (len(sizes) - 1) * (len(arms) + 0.8) + len(arms) - 0.3)
    axis.set_ylabel("test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    _clean(axis)
    return figure


def _draw_against_batch_size(results: dict[str, Any], table: Sequence[ArmRow]) -> Figure:
    """The papers' figure: a line per arm over a logarithmic axis of batch sizes."""
    sizes = sorted(results["experiment"]["batch_sizes"])
    arms = [arm["name"] for arm in results["experiment"]["arms"]]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for position, arm in enumerate(arms):
        color = color_of(results, arm)
        mine = sorted((row for row in table if row.arm == arm), key=lambda row: row.batch_size)
        # Side by side, or the intervals of several arms hide each other.
        shift = 1.03 ** (position - (len(arms) - 1) / 2)
        places = [row.batch_size * shift for row in mine]
        axis.plot(places, [row.accuracy.mean for row in mine], color=color, linewidth=1.4, label=short(arm))
        for place, row in zip(places, mine, strict=True):
            _point(axis, place, row, color, spread=0.0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("batch size")
    axis.set_ylabel("test accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(arms))
    _clean(axis)
    return figure


def _point(axis: Any, x: float, row: ArmRow, color: str, spread: float = 0.12) -> None:
    if not row.accuracies:
        return
    beside = np.linspace(-spread, spread, len(row.accuracies)) if len(row.accuracies) > 1 else np.zeros(1)
    axis.scatter(x + beside, row.accuracies, s=14, color=color, alpha=0.55, linewidths=0)
    half = 0.0 if math.isnan(row.accuracy.half) else row.accuracy.half
    mean = row.accuracy.mean
    reach = [[min(half, mean)], [min(half, 1 - mean)]]  # an accuracy cannot leave [0, 1]
    axis.errorbar(x, mean, yerr=reach, fmt="o", ms=6, color=color, capsize=5, linewidth=1.6)


def _clean(axis: Any) -> None:
    axis.grid(color="0.9", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
