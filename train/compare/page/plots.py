"""The comparison's interactive figures, by plotly: learning curves, accuracies, the search, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nfnets.signal.panels import COLORS
from nfnets.train.compare.page.calibration import Bin, reliability
from nfnets.train.compare.page.figures import MEASURES, Curve, searched, short
from nfnets.train.compare.protocol import rate
from nfnets.train.compare.statistics import wilson
from nfnets.train.compare.summary import ArmRow


def color_of(results: dict[str, Any], arm: str) -> str:
    """The arm's color on the page, which reads on white and on dark."""
    names = [entry["name"] for entry in results["experiment"]["arms"]]
    return COLORS[names.index(arm) % len(COLORS)]


def plotly_curves(results: dict[str, Any], found: Sequence[Curve]) -> go.Figure:
    """Validation accuracy and training loss over epochs, a column per batch size, bands over the seeds."""
    sizes = results["experiment"]["batch_sizes"]
    figure = make_subplots(
        rows=2,
        cols=len(sizes),
        shared_xaxes=True,
        shared_yaxes="rows",  # pyright: ignore[reportArgumentType]
        vertical_spacing=0.07,
        horizontal_spacing=0.04,
        column_titles=[f"batch size {size}" for size in sizes],
    )
    named: set[str] = set()
    for curve in found:
        place = {
            "row": 1 + [m for m, _ in MEASURES].index(curve.measure),
            "col": 1 + sizes.index(curve.batch_size),
        }
        color = color_of(results, curve.arm)
        common: dict[str, Any] = {"legendgroup": curve.arm, "mode": "lines"}
        band = {"line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_scatter(x=curve.epochs, y=curve.low, **common, **band, **place)
        figure.add_scatter(
            x=curve.epochs, y=curve.high, fill="tonexty", fillcolor=_faint(color), **common, **band, **place
        )
        figure.add_scatter(
            x=curve.epochs,
            y=curve.mean,
            name=_safe(curve.arm),
            line={"color": color, "width": 2},
            showlegend=curve.arm not in named,
            hovertemplate="epoch %{x:.2f}: %{y:.4f}",
            **common,
            **place,
        )
        named.add(curve.arm)
    figure.update_xaxes(title_text="epoch", row=2)
    figure.update_yaxes(title_text="validation accuracy", tickformat=".1~%", row=1, col=1)
    figure.update_yaxes(type="log", dtick="D2", tickformat=".2~g", row=2)
    figure.update_yaxes(title_text="training loss", row=2, col=1)
    return _plain(figure, height=470)


def _by_batch_size(sizes: Sequence[int]) -> go.Figure:
    """A column for every batch size, one axis for all."""
    return make_subplots(
        rows=1,
        cols=len(sizes),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        column_titles=[f"batch size {size}" for size in sizes],
    )


def plotly_search(results: dict[str, Any]) -> go.Figure:
    """Validation accuracy against learning rate, with Wilson's 95 % interval of one model or the range of several."""
    sizes = results["experiment"]["batch_sizes"]
    figure = _by_batch_size(sizes)
    names = [arm["name"] for arm in results["experiment"]["arms"]]
    for entry in searched(results):
        tried = [t for t in entry["tried"] if t["accuracies"]]
        place = {"row": 1, "col": 1 + sizes.index(entry["batch_size"])}
        color = color_of(results, entry["arm"])
        spans = [
            _wilson(t["val_accuracy"], results["data"]["val"])
            if len(results["tuning_seeds"]) == 1
            else (min(t["accuracies"]), max(t["accuracies"]))
            for t in tried
        ]
        figure.add_scatter(
            # A little apart, or arms that see the same hide each other.
            x=[t["lr"] * 1.02 ** names.index(entry["arm"]) for t in tried],
            customdata=[t["lr"] for t in tried],
            y=[t["val_accuracy"] for t in tried],
            name=_safe(entry["arm"]),
            legendgroup=entry["arm"],
            showlegend=place["col"] == 1,
            mode="lines+markers",
            line={"color": color, "width": 2},
            marker={"size": [13 if t["lr"] == entry["lr"] else 7 for t in tried]},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [high - t["val_accuracy"] for t, (_, high) in zip(tried, spans, strict=True)],
                "arrayminus": [t["val_accuracy"] - low for t, (low, _) in zip(tried, spans, strict=True)],
                "thickness": 1,
                "width": 4,
            },
            hovertemplate="lr %{customdata}: %{y:.2%}",
            **place,
        )
    rates = sorted({t["lr"] for entry in searched(results) for t in entry["tried"]})
    figure.update_xaxes(
        title_text="learning rate", type="log", tickvals=rates, ticktext=[rate(r) for r in rates]
    )
    figure.update_yaxes(title_text="validation accuracy", tickformat=".1~%", col=1)
    return _plain(figure, height=340).update_layout(hovermode="closest")


def plotly_accuracy(results: dict[str, Any], table: Sequence[ArmRow]) -> go.Figure:
    """Test accuracy of every seed with mean and 95 % interval, against batch size."""
    sizes = sorted(results["experiment"]["batch_sizes"])
    arms = [arm["name"] for arm in results["experiment"]["arms"]]
    figure = go.Figure()
    for position, arm in enumerate(arms):
        color = color_of(results, arm)
        mine = sorted((row for row in table if row.arm == arm), key=lambda row: row.batch_size)
        # Side by side, or the intervals of several arms hide each other.
        shift = 0.5 * (position - (len(arms) - 1) / 2) / len(arms)
        places = [sizes.index(row.batch_size) + shift for row in mine]
        means = [row.accuracy.mean for row in mine]
        halves = [0.0 if math.isnan(row.accuracy.half) else row.accuracy.half for row in mine]
        figure.add_scatter(
            x=[x for x, row in zip(places, mine, strict=True) for _ in row.accuracies],
            y=[accuracy for row in mine for accuracy in row.accuracies],
            text=[f"seed {seed}" for row in mine if row.accuracies for seed in row.seeds],
            mode="markers",
            marker={"color": color, "size": 5, "opacity": 0.5},
            legendgroup=arm,
            showlegend=False,
            hovertemplate="%{text}: %{y:.2%}<extra>" + _safe(arm) + "</extra>",
        )
        figure.add_scatter(
            x=places,
            y=means,
            error_y={
                "type": "data",
                "symmetric": False,
                # An accuracy cannot leave [0, 1].
                "array": [min(half, 1 - mean) for half, mean in zip(halves, means, strict=True)],
                "arrayminus": [min(half, mean) for half, mean in zip(halves, means, strict=True)],
                "thickness": 1.6,
                "width": 5,
            },
            name=_safe(arm),
            legendgroup=arm,
            mode="lines+markers" if len(sizes) > 2 else "markers",
            line={"color": color, "width": 1.6},
            marker={"color": color, "size": 9},
            hovertemplate="mean %{y:.2%}<extra>" + _safe(arm) + "</extra>",
        )
    figure.update_xaxes(
        title_text="batch size",
        tickvals=list(range(len(sizes))),
        ticktext=[str(size) for size in sizes],
        range=[-0.5, len(sizes) - 0.5],
    )
    figure.update_yaxes(title_text="test accuracy", tickformat=".2~%")
    return _plain(figure, height=340).update_layout(hovermode="closest")


def plotly_reliability(results: dict[str, Any]) -> go.Figure | None:
    """Accuracy against confidence, a panel per batch size, over the samples of all seeds; None without bins."""
    sizes = results["experiment"]["batch_sizes"]
    found = reliability(results)
    if not found:
        return None
    figure = _by_batch_size(sizes)
    named: set[str] = set()
    for column in range(1, len(sizes) + 1):
        figure.add_scatter(
            x=[0, 1],
            y=[0, 1],
            mode="lines",
            line={"color": "rgba(128,128,128,0.7)", "width": 1, "dash": "dot"},
            name="calibrated",
            legendgroup="calibrated",
            showlegend=column == 1,
            hoverinfo="skip",
            row=1,
            col=column,
        )
    for (arm, batch_size), bins in found.items():
        spans = [wilson(_hits(b), b.count) for b in bins]
        figure.add_scatter(
            x=[b.confidence for b in bins],
            y=[b.accuracy for b in bins],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, high - b.accuracy) for b, (_, high) in zip(bins, spans, strict=True)],
                "arrayminus": [max(0.0, b.accuracy - low) for b, (low, _) in zip(bins, spans, strict=True)],
                "thickness": 1,
                "width": 3,
            },
            customdata=[b.count for b in bins],
            name=_safe(arm),
            legendgroup=arm,
            showlegend=arm not in named,
            mode="lines+markers",
            line={"color": color_of(results, arm), "width": 1.6},
            marker={"size": 6},
            hovertemplate="confidence %{x:.1%}, accuracy %{y:.1%}, %{customdata} samples<extra>"
            + _safe(arm)
            + "</extra>",
            row=1,
            col=1 + sizes.index(batch_size),
        )
        named.add(arm)
    # Without 0 and 100 %, which would run into each other between panels.
    figure.update_xaxes(
        title_text="confidence", tickformat=".0%", tickvals=[0.2, 0.4, 0.6, 0.8], range=[0, 1.02]
    )
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_yaxes(title_text="accuracy", col=1)
    return _plain(figure, height=380).update_layout(hovermode="closest")


def _wilson(accuracy: float, total: int) -> tuple[float, float]:
    return wilson(min(total, round(accuracy * total)), total)


def _hits(entry: Bin) -> int:
    return min(entry.count, max(0, round(entry.accuracy * entry.count)))


def _safe(text: str) -> str:
    """An arm's name in a figure; plotly takes some HTML in its labels."""
    return short(text).replace("&", "&amp;").replace("<", "&lt;")


def _plain(figure: go.Figure, height: int) -> go.Figure:
    """Transparent, without plotly's template: the page's own colors show through, in the dark too."""
    grid = {"gridcolor": "rgba(128,128,128,0.22)", "zeroline": False, "linecolor": "rgba(128,128,128,0.5)"}
    figure.update_xaxes(**grid)
    figure.update_yaxes(**grid)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 16, "t": 78, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#808080"},
        hovermode="x unified",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,128,128,0.5)", "activecolor": "#808080"},
        legend={"orientation": "h", "yref": "container", "y": 1, "yanchor": "top", "x": 0},
    )
    return figure


def _faint(color: str) -> str:
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},0.2)"
