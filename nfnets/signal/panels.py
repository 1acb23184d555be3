"""Interactive panels over depth, by plotly: data here, drawing in the browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nfnets.signal.figure import FLOOR, SICK, Panel, end, line, panels_of, place, values
from nfnets.signal.measured import Measured, Point
from nfnets.signal.rules import (
    COSINE,
    DEAD,
    FP16_BITS,
    JUMP,
    MEAN_SHIFT,
    VANISHING,
    Finding,
    growth_limit,
    reference,
    trunk,
)
from nfnets.signal.table import number

# The figure's hues, lightened until they read on white and on dark.
COLORS = ("#2b8cd8", "#e0691b", "#14a37a", "#cc6fa6", "#8a7fe0", "#c9960c")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
_LAYERS = (
    ("Average channel variance", "var", True),
    ("Mean cosine between samples", "cosine", False),
    ("Dead units", "dead", False),
    ("fp16 headroom [bits]", "headroom_fp16", False),
    ("Gradient: average channel variance", "grad_var", True),
    ("Update / weight", "update_ratio", True),
)
# Layers whose names fit under an axis.
_NAMED = 40
_LIMITS = {"cosine": COSINE, "dead": DEAD, "headroom_fp16": FP16_BITS}


def hover(p: Point) -> str:
    """What the pointer shows over a point."""
    name = p.name.replace("<", "&lt;")
    shape = "×".join(map(str, p.shape))
    head = f"<b>{name}</b>  {p.role or p.kind}<br>{p.model.replace('<', '&lt;')}, depth {p.depth}, {shape}"
    shown = (
        ("squared mean", p.mean_sq),
        ("variance", p.var),
        ("predicted variance", p.predicted_var),
        ("residual variance", p.residual_var),
        ("predicted residual", p.predicted_residual_var),
        ("dead", p.dead),
        ("range", None if p.min is None else f"{number(p.min)} … {number(p.max)}"),
        ("cosine", p.cosine),
        ("gradient variance", p.grad_var),
    )
    return head + "".join(f"<br>{label} {number(v)}" for label, v in shown if v is not None)


def figures(
    report: Measured, step: int | None = None, causes: Sequence[Finding] = ()
) -> list[dict[str, Any]]:
    """Plotly figures (`data`, `layout`) of one step: the paper's three panels, then the layers'.

    Args:
        report: what was measured.
        step: a sampled step; the latest when omitted.
        causes: what the verdict starts with, marked in every panel.

    Returns:
        Plain JSON types.
    """
    return [f for f in (_blocks(report, step, causes), _layers(report, step, causes)) if f["data"]]


def _end(panel: int, x: float, y: float, model: str, name: str) -> dict[str, Any]:
    trace = _trace(0, model, panel, x=[x], y=[y], mode="markers", hoverinfo="text")
    trace["hovertext"] = f"NaN or inf from {name.replace('<', '&lt;')} on"
    return trace | {"marker": {"color": SICK, "symbol": "x", "size": 11}, "meta": {"what": "end"}}


def _mark(layout: dict[str, Any], x: float, name: str, panels: int) -> None:
    """A line through all panels where it starts, and its name at the top of the first."""
    for panel in range(panels):
        axis = "" if panel == 0 else str(panel + 1)
        where = {"xref": f"x{axis}", "yref": f"y{axis} domain", "x0": x, "x1": x, "y0": 0, "y1": 1}
        layout["shapes"].append(
            {"type": "line", "layer": "below", "line": {"color": SICK, "width": 1.5}} | where
        )
    layout["annotations"].append(
        {
            "text": f"starts at {name.replace('<', '&lt;')}",
            "x": x,
            "y": 1,
            "xref": "x",
            "yref": "y domain",
            "xanchor": "left",
            "xshift": 4,
            "yanchor": "top",
            "showarrow": False,
            "font": {"size": 12, "color": SICK},
        }
    )


def _trace(index: int, model: str, panel: int, **more: Any) -> dict[str, Any]:
    axis = "" if panel == 0 else str(panel + 1)
    color = COLORS[index % len(COLORS)]
    line_style = {"color": color, "width": 2} | more.pop("line", {})
    return {
        "type": "scatter",
        "name": model,
        "legendgroup": model,
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
        "line": line_style,
        "marker": {"color": color, "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7},
        "showlegend": False,
        **more,
    }


def _series(
    index: int, model: str, panel: int, points: Sequence[Point], x: Sequence[float], y: Sequence[float | None]
) -> dict[str, Any]:
    return _trace(
        index,
        model,
        panel,
        x=list(x),
        y=list(y),
        text=[hover(p) for p in points],
        hovertemplate="%{text}<extra></extra>",
        mode="lines+markers",
        meta={"measured": True},
    )


def _faint(
    index: int, model: str, panel: int, x: Sequence[float], y: Sequence[float | None], dash: str
) -> dict[str, Any]:
    return _trace(
        index,
        model,
        panel,
        x=list(x),
        y=list(y),
        mode="lines",
        line={"dash": dash, "width": 1.5},
        opacity=0.8 if dash == "dash" else 0.5,
        hoverinfo="skip",
        meta={"what": "predicted" if dash == "dash" else "limit"},
    )


def _blocks(report: Measured, step: int | None, causes: Sequence[Finding]) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    panels = panels_of(report)
    drawn: list[list[float]] = [[] for _ in panels]
    residual = False
    marks: list[tuple[float, str]] = []
    for i, model in enumerate(report.models):
        every = report.select(model=model, step=step)
        points = line(every)
        x = list(range(len(points)))
        residual = residual or any(p.role == "join" for p in points)
        marks += [(place(points, every, c), c.name or "(input)") for c in causes if c.model == model]
        for panel, shown in enumerate(panels):
            y, theory = shown.along(points, shown.measured), shown.along(points, shown.predicted)
            if (last := end(points, y)) is not None:
                data.append(_end(panel, *last, model, points[last[0]].name))
                drawn[panel].append(last[1])
            if all(v is None for v in y):
                continue
            drawn[panel] += [v for v in (*y, *theory) if v is not None]
            if any(v is not None for v in theory):
                data.append(_faint(i, model, panel, x, theory, "dash"))
            data += [_faint(i, model, panel, x, limit, "dot") for limit in _limits(every, points, shown)]
            data.append(_series(i, model, panel, points, x, y))
    layout = _layout([p.title for p in panels], "Residual block" if residual else "Layer", drawn)
    for x, name in marks:
        _mark(layout, x, name, len(panels))
    if not residual:
        _name(layout, [line(report.select(model=model, step=step)) for model in report.models], len(panels))
    return {"data": data, "layout": layout}


def _name(layout: dict[str, Any], lines: Sequence[Sequence[Point]], panels: int) -> None:
    """Names of the layers on the last axis, where all models have the same and they fit."""
    names = [p.name for p in lines[0]]
    if len(names) <= _NAMED and all([p.name for p in points] == names for points in lines):
        layout[f"xaxis{panels}"] |= {"tickvals": list(range(len(names))), "ticktext": names, "tickangle": -35}
        layout["margin"] |= {"b": 46 + 4 * max(map(len, names), default=0)}


def _limits(every: Sequence[Point], points: Sequence[Point], panel: Panel) -> list[list[float | None]]:
    """The curves above (or below) which a default rule fails."""
    if panel.over:
        return [[JUMP] * len(points)]
    judged = {p.name for p in trunk(every)}
    if panel.measured == "mean_sq":
        found = zip(points, values(points, "var"), strict=True)
        return [[None if v is None or p.name not in judged else MEAN_SHIFT * v for p, v in found]]
    if panel.measured != "var":
        return []
    upper = {p.name: limit for p, limit in zip(trunk(every), growth_limit(every), strict=True)}
    low = VANISHING * reference(every)
    return [[upper.get(p.name) for p in points], [max(low, FLOOR)] * len(points)]


def _layers(report: Measured, step: int | None, causes: Sequence[Finding]) -> dict[str, Any]:
    points = {m: [p for p in report.select(model=m, step=step) if p.kind != "input"] for m in report.models}
    shown = [
        row for row in _LAYERS if any(getattr(p, row[1]) is not None for ps in points.values() for p in ps)
    ]
    data: list[dict[str, Any]] = []
    drawn: list[list[float] | None] = [[] if log else None for _, _, log in shown]
    deepest = max((p.depth for ps in points.values() for p in ps), default=0) + 1
    for panel, (_, name, _) in enumerate(shown):
        if name in _LIMITS:
            data.append(_faint(0, report.models[0], panel, [0, deepest], [_LIMITS[name]] * 2, "dot"))
            data[-1] |= {"legendgroup": "", "line": {"color": "#888", "dash": "dot", "width": 1.5}}
    for i, (model, ps) in enumerate(points.items()):
        placed = _placed(ps)
        for panel, (_, name, log) in enumerate(shown):
            y = [_shown(p, name, log) for p, _ in placed]
            if (values := drawn[panel]) is not None:
                values += [v for v in y if v is not None]
            series = _series(i, model, panel, [p for p, _ in placed], [x for _, x in placed], y)
            series["connectgaps"] = True
            series["marker"]["size"] = 4
            series["line"]["width"] = 1.3
            data.append(series)
            known = [v for v in y if v is not None]
            at = next((k for k, (p, _) in enumerate(placed) if p.nonfinite), None)
            if at is not None and log:
                height = next((v for v in reversed(y[:at]) if v is not None), max(known, default=1.0))
                data.append(_end(panel, placed[at][1], height, model, placed[at][0].name))
    layout = _layout([t for t, _, _ in shown], "Depth [weight layers]", drawn)
    for cause in causes:
        where = {p.name: x for p, x in _placed(points.get(cause.model, ()))}
        _mark(layout, where.get(cause.name, 0.0), cause.name or "(input)", len(shown))
    return {"data": data, "layout": layout}


def _placed(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Points over depth: what follows a weight layer is spread up to the next, so that models align layer by layer."""
    groups: dict[int, list[Point]] = {}
    for p in points:
        groups.setdefault(p.depth, []).append(p)
    return [(p, depth + i / len(ps)) for depth, ps in sorted(groups.items()) for i, p in enumerate(ps)]


def _shown(p: Point, name: str, log: bool) -> float | None:
    """A layer's value, or `None` for a gap: zero has no place on a log axis, and only activations die."""
    v = getattr(p, name)
    if v is None or not math.isfinite(v) or (log and v <= 0) or (name == "dead" and p.kind != "activation"):
        return None
    return v


def _log_range(values: Sequence[float]) -> tuple[list[float], int]:
    """A log axis around what was measured, two decades at least, and decades between labels.

    Limits do not stretch it: a healthy network is read at its own scale, and a limit shows where it is near.
    """
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (-1.0, 1.0)
    pad = max(0.0, 2 - (high - low)) / 2 + 0.15 + 0.03 * (high - low)
    return [low - pad, high + pad], max(1, math.ceil((high - low + 2 * pad) / 6))


def _layout(titles: Sequence[str], x_title: str, drawn: Sequence[Sequence[float] | None]) -> dict[str, Any]:
    """Panels under one another on one x axis, so that a place reads down the page.

    `drawn` holds the values of each panel with a log axis, `None` for a linear one.
    """
    count = max(1, len(titles))
    gap = 0.28 / count
    height = (1 - gap * (count - 1)) / count
    layout: dict[str, Any] = {
        "height": 90 + 215 * count,
        "margin": {"l": 66, "r": 14, "t": 34, "b": 46},
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "annotations": [],
        "shapes": [],
    }
    for i, (title, shown) in enumerate(zip(titles, drawn, strict=True)):
        axis = "" if i == 0 else str(i + 1)
        top = 1 - i * (height + gap)
        bottom = max(0.0, top - height)
        last = i == count - 1
        layout[f"xaxis{axis}"] = {
            "anchor": f"y{axis}",
            "showticklabels": last,
            "title": {"text": x_title if last else "", "standoff": 8},
            "zeroline": False,
        } | ({"matches": "x"} if i else {})
        layout[f"yaxis{axis}"] = {
            "domain": [bottom, top],
            "anchor": f"x{axis}",
            "zeroline": False,
        }
        if shown is None:
            layout[f"yaxis{axis}"] |= {"type": "linear", "rangemode": "tozero"}
        else:
            limits, dtick = _log_range(shown)
            layout[f"yaxis{axis}"] |= {
                "type": "log",
                "range": limits,
                "dtick": dtick,
                "exponentformat": "power",
            }
        layout["annotations"].append(
            {
                "text": f"<b>{title}</b>",
                "x": 0,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 13},
            }
        )
    return layout
