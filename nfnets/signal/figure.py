"""The three-panel figure of the NF-ResNet paper, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from nfnets.errors import UserError
from nfnets.signal.measured import Measured, Point
from nfnets.signal.rules import Finding, check, trunk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow and black: distinct for the color-blind and on white and dark.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")

SICK = "#C0271F"
# A log axis has no zero: what is zero, or zero up to rounding, is drawn here instead of stretching it to 1e-17.
FLOOR = 1e-4


def line(points: Sequence[Point]) -> list[Point]:
    """The points along the paper's x axis: the stem and the joins; without joins what the weight layers put out.

    Not what enters the activations, as rules judge it: behind norm layers that is 1 everywhere.
    """
    blocks = [p for p in points if p.block is not None]
    if any(p.role == "join" for p in blocks):
        return blocks
    return [p for p in points if p.kind in ("conv", "linear") and p.role != "head"] or trunk(points)


def values(points: Sequence[Point], name: str) -> list[float | None]:
    """One statistic along a line, fit for a log axis: `None` where it is missing or not finite."""
    out: list[float | None] = []
    for p in points:
        v = getattr(p, name)
        out.append(max(v, FLOOR) if isinstance(v, int | float) and math.isfinite(v) else None)
    return out


class Panel(NamedTuple):
    """What one panel shows along a line."""

    title: str
    measured: str
    predicted: str
    over: bool = False
    """As factors from the point before."""

    def along(self, points: Sequence[Point], name: str) -> list[float | None]:
        """One of its two statistics along a line."""
        found = values(points, name)
        if not self.over:
            return found
        return [None, *(b / a if a and b is not None else None for a, b in pairwise(found))][: len(found)]


PANELS = (
    Panel("Average channel squared mean", "mean_sq", "predicted_mean_sq"),
    Panel("Average channel variance", "var", "predicted_var"),
)
BRANCHES = Panel("Residual average channel variance", "residual_var", "predicted_residual_var")
FACTORS = Panel("Variance over that of the layer before", "var", "predicted_var", over=True)
"""Where there are no branches (plain networks, U-Nets): what each layer makes of the signal."""


def panels_of(report: Measured) -> tuple[Panel, ...]:
    """The paper's three panels; without branches the third is of the layers."""
    return (*PANELS, BRANCHES if any(p.role == "join" for p in report.points) else FACTORS)


def place(points: Sequence[Point], every: Sequence[Point], cause: Finding) -> float:
    """Where on a line a finding lies: at its point, or between the points before and after it."""
    names = [p.name for p in points]
    if cause.name in names:
        return float(names.index(cause.name))
    before = [p.name for p in every[: next((i for i, p in enumerate(every) if p.name == cause.name), 0)]]
    return sum(name in before for name in names) - 0.5


def end(points: Sequence[Point], drawn: Sequence[float | None]) -> tuple[int, float] | None:
    """Where values stop being finite, and the height to mark it at: that of the last one drawn before."""
    index = next((i for i, p in enumerate(points) if p.nonfinite), None)
    if index is None:
        return None
    return index, next((v for v in reversed(drawn[:index]) if v is not None), 1.0)


def draw(report: Measured, step: int | None = None) -> Figure:
    """Draws the latest (or the given) step of every model.

    Args:
        report: what was measured.
        step: a sampled step.

    Returns:
        A matplotlib figure that belongs to no window manager: nothing to close.

    Raises:
        UserError: nothing to draw.

    Paper: arXiv 2101.08692, figures 1 to 3.
    """
    from matplotlib import rc_context

    if not report.points:
        raise UserError(
            "a report without points: expected measurements; profile a model or let the probe see a step"
        )
    style: dict[Any, Any] = {
        "font.family": "serif",
        "mathtext.fontset": "dejavuserif",
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
    }
    with rc_context(style):
        return _draw(report, step)


def _draw(report: Measured, step: int | None) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    figure = Figure(figsize=(10.5, 3.3), dpi=160, layout="constrained")
    panels = panels_of(report)
    axes: Sequence[Axes] = figure.subplots(1, len(panels), sharex=True)
    lines = {m: line(report.select(model=m, step=step)) for m in report.models}
    every = {m: report.select(model=m, step=step) for m in report.models}
    causes = {cause.model: cause for cause in check(report).causes}
    residual = any(p.role == "join" for points in lines.values() for p in points)
    for panel, ax in zip(panels, axes, strict=True):
        drawn: list[float] = []
        for i, (model, points) in enumerate(lines.items()):
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            x = range(len(points))
            theory, seen = panel.along(points, panel.predicted), panel.along(points, panel.measured)
            drawn += [v for v in (*theory, *seen) if v is not None]
            ax.plot(x, _gaps(theory), color=color, linestyle=(0, (4, 2)), linewidth=1.1, alpha=0.8)
            ax.plot(
                x, _gaps(seen), color=color, marker=marker, markersize=3.2, linewidth=1.3, markeredgewidth=0
            )
            if model in causes:
                ax.axvline(place(points, every[model], causes[model]), color=SICK, linewidth=1, zorder=0)
            if (last := end(points, seen)) is not None:
                ax.plot(*last, color=SICK, marker="x", markersize=6, markeredgewidth=1.6)
                drawn.append(last[1])
        ax.set_title(panel.title)
        ax.set_xlabel("Residual block" if residual else "Layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        ax.grid(True, which="major", color="0.88", linewidth=0.6)
        ax.set_axisbelow(True)
        if drawn:
            ax.set_yscale("log")
            # At least two decades: on a shorter log axis noise of a percent looks like structure.
            low, high = min(drawn), max(drawn)
            decades = math.log10(high / low)
            pad = max(0.0, 2.0 - decades) / 2 + 0.05 * max(decades, 2.0)
            ax.set_ylim(low / 10**pad, high * 10**pad)
            ax.yaxis.set_major_formatter(FuncFormatter(_tick))
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_yticks([])
            ax.text(0.5, 0.5, "nothing to compare", transform=ax.transAxes, ha="center", color="0.4")
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=4, label=m)
        for i, m in enumerate(lines)
    ]
    if any(v is not None for ps in lines.values() for v in values(ps, "predicted_var")):
        handles.append(Line2D([], [], color="0.35", linestyle=(0, (4, 2)), linewidth=1.1, label="predicted"))
    if causes:
        handles.append(Line2D([], [], color=SICK, linewidth=1, label="where it starts"))
    if any(p.nonfinite for p in report.points):
        handles.append(Line2D([], [], color=SICK, marker="x", linestyle="", label="NaN or inf from here on"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    return figure


def _tick(value: float, _: object = None) -> str:
    if value <= 0:
        return ""
    text = f"{value:g}" if 1e-2 <= value <= 100 else f"10^{{{round(math.log10(value))}}}"
    return rf"$\leq {text}$" if math.isclose(value, FLOOR) else f"${text}$"


def _gaps(series: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in series]
