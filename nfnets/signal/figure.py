"""The three-panel figure of the NF-ResNet paper, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nfnets.errors import UserError
from nfnets.signal.measured import Measured, Point
from nfnets.signal.rules import trunk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without yellow and black: distinct for the color-blind and on white and dark.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")

PANELS = (
    ("Average channel squared mean", "mean_sq", "predicted_mean_sq"),
    ("Average channel variance", "var", "predicted_var"),
    ("Residual average channel variance", "residual_var", "predicted_residual_var"),
)
# A log axis has no zero: what is zero, or zero up to rounding, is drawn here instead of stretching it to 1e-17.
FLOOR = 1e-4


def line(points: Sequence[Point]) -> list[Point]:
    """The points along the paper's x axis: the stem and the joins; for a plain network its trunk."""
    blocks = [p for p in points if p.block is not None]
    return blocks if any(p.role == "join" for p in blocks) else trunk(points)


def values(points: Sequence[Point], name: str) -> list[float | None]:
    """One statistic along a line, fit for a log axis: `None` where it is missing or not finite."""
    out: list[float | None] = []
    for p in points:
        v = getattr(p, name)
        out.append(max(v, FLOOR) if isinstance(v, int | float) and math.isfinite(v) else None)
    return out


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
    axes: Sequence[Axes] = figure.subplots(1, 3, sharex=True)
    lines = {m: line(report.select(model=m, step=step)) for m in report.models}
    residual = any(p.role == "join" for points in lines.values() for p in points)
    for (title, measured, predicted), ax in zip(PANELS, axes, strict=True):
        drawn: list[float] = []
        for i, (_, points) in enumerate(lines.items()):
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            x = range(len(points))
            theory, seen = values(points, predicted), values(points, measured)
            drawn += [v for v in (*theory, *seen) if v is not None]
            ax.plot(x, _gaps(theory), color=color, linestyle=(0, (4, 2)), linewidth=1.1, alpha=0.8)
            ax.plot(
                x, _gaps(seen), color=color, marker=marker, markersize=3.2, linewidth=1.3, markeredgewidth=0
            )
        ax.set_title(title)
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
            ax.text(0.5, 0.5, "no residual branches", transform=ax.transAxes, ha="center", color="0.4")
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], markersize=4, label=m)
        for i, m in enumerate(lines)
    ]
    if any(v is not None for ps in lines.values() for v in values(ps, "predicted_var")):
        handles.append(Line2D([], [], color="0.35", linestyle=(0, (4, 2)), linewidth=1.1, label="predicted"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    return figure


def _tick(value: float, _: object = None) -> str:
    if value <= 0:
        return ""
    text = f"{value:g}" if 1e-2 <= value <= 100 else f"10^{{{round(math.log10(value))}}}"
    return rf"$\leq {text}$" if math.isclose(value, FLOOR) else f"${text}$"


def _gaps(series: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in series]
