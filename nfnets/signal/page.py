"""The report as one self-contained HTML page, and as a fragment for other pages."""

from __future__ import annotations

import base64
import html
import io
import json
import uuid
from typing import Any

from nfnets.signal import assets, plotlyjs
from nfnets.signal.figure import draw
from nfnets.signal.measured import Measured, Point
from nfnets.signal.panels import COLORS, figures
from nfnets.signal.rules import RULES, Check, check
from nfnets.signal.table import number
from nfnets.signal.told import told

_HEADERS = (
    ("model", "Model", ""),
    ("step", "Step", "sampled training step"),
    ("name", "Point", "module path; a join carries the path of the module that adds"),
    ("kind", "Kind", ""),
    ("role", "Role", ""),
    ("depth", "Depth", "weight layers on the longest path from the input"),
    ("shape", "Shape", "of the output"),
    ("mean_sq", "Squared mean", "average channel squared mean"),
    ("var", "Variance", "average channel variance"),
    ("predicted_var", "Predicted", "variance that theory expects"),
    ("residual_var", "Residual", "average channel variance at the branch end, before SkipInit and α"),
    ("predicted_residual_var", "Predicted residual", "residual variance that theory expects"),
    ("total_var", "Total variance", "over everything"),
    ("dead", "Dead", "fraction of channels that do not vary over the batch"),
    ("min", "Min", ""),
    ("max", "Max", ""),
    ("headroom_fp16", "fp16 bits", "log2(65504 / max|x|)"),
    ("cosine", "Cosine", "mean cosine similarity between samples"),
    ("rank", "Rank", "effective rank of the batch, at most min(N, 16)"),
    ("weight_norm", "‖W‖", "L2 norm of the stored weight"),
    ("update_ratio", "‖ΔW‖/‖W‖", "update of one step"),
    ("clipped", "Clipped", "fraction of the weight's units that AGC clipped"),
    ("grad_mean_sq", "Grad. sq. mean", "average channel squared mean of the gradient"),
    ("grad_var", "Grad. variance", "average channel variance of the gradient"),
    ("grad_norm", "Grad. norm", "L2 norm of the gradient"),
    ("weight_grad_norm", "‖∂W‖", "L2 norm of the weight's gradient"),
    ("training_var", "Variance in training", "average channel variance with dropout and stochastic depth on"),
)
_KEYS = {
    "dash": "theory: what these weights would do to white noise at the start; a reference, not a limit",
    "dot": "limit of a rule",
    "cause": "where it starts",
    "end": "NaN or inf from here on",
}
_SECOND = (
    '<p class="notes"><code>#2</code> behind a name: the second point of that name, where a module is called again or '
    "adds twice (attention, then the MLP).</p>"
)
_TEXT = {"model", "name", "kind", "role", "shape"}


def panels(report: Measured, plotly: str = "") -> str:
    """The panels, model switches and (with several steps) the timeline, as one `<div>` and its script.

    Args:
        report: what was measured.
        plotly: the script that brings plotly.js; without one the page must have it already.

    Returns:
        HTML for the body of a page.
    """
    ident = f"signal-{uuid.uuid4().hex[:12]}"
    steps = report.steps
    # Figures by step; the page redraws when the timeline moves.
    causes = check(report).causes if report.points else ()
    drawn = [figures(report, step, causes) for step in steps]
    texts: dict[str, int] = {}
    for trace in (trace for figure in drawn for one in figure for trace in one["data"] if "text" in trace):
        # A point hovers in up to nine panels with one text.
        trace["text"] = [texts.setdefault(text, len(texts)) for text in trace["text"]]
    data = {"steps": list(steps), "figures": drawn, "texts": list(texts)}
    switches = "".join(
        f'<label style="--c:{COLORS[i % len(COLORS)]}"><input type="checkbox" checked value="{html.escape(m)}">'
        f"<i></i>{html.escape(m)}</label>"
        for i, m in enumerate(report.models)
    )
    timeline = (
        f'<label class="time">Step <input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" '
        f'step="1" aria-label="training step"><output>{steps[-1]}</output></label>'
        if len(steps) > 1
        else ""
    )
    has = {
        "dash": any(p.predicted_var is not None for p in report.points),
        "dot": True,
        "cause": bool(causes),
        "end": any(p.nonfinite for p in report.points),
    }
    keys = "".join(f'<span><b class="{k}"></b>{text}</span>' for k, text in _KEYS.items() if has[k])
    return (
        f"<style>{assets.PANELS_CSS}</style>\n"
        f'<div class="nfnets-signal" id="{ident}">'
        f'<div class="controls" role="group" aria-label="models shown">{switches}{timeline}{keys}</div>'
        "<noscript><p>The interactive panels need JavaScript; the table reads without it.</p></noscript>"
        '<div class="plots"></div></div>\n'
        f'{plotly}<script type="application/json" id="{ident}-data">{_json(data)}</script>\n'
        f"<script>{assets.PANELS_JS}\n{plotlyjs.THEN}(() => nfnetsSignal({json.dumps(ident)}));</script>\n"
    )


def page(report: Measured, plotly: str | None = None) -> str:
    """The whole page.

    Args:
        report: what was measured.
        plotly: the script that brings plotly.js; None embeds it.

    Returns:
        One HTML document that needs nothing else, and no network.
    """
    plotly = plotlyjs.embedded() if plotly is None else plotly
    verdict = check(report)
    models = ", ".join(report.models)
    shapes = "; ".join("×".join(map(str, s)) for s in report.meta.get("inputs", []))
    facts = [f"{len(report.points)} points", *([f"input {shapes}"] if shapes else [])]
    facts += [f"torch {report.meta['torch']}"] if "torch" in report.meta else []
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>Signal propagation: {html.escape(models)}</title><style>{assets.PAGE_CSS}</style></head>\n<body>"
        f"<header><h1>Signal propagation</h1><p>{html.escape(models)} · {html.escape(' · '.join(facts))}</p></header>"
        f"<main>{told(verdict)}{_notes(report)}"
        f"<section><h2>Over depth</h2>{panels(report, plotly)}</section>"
        f"<section><h2 id=points>Points</h2>{_second(report)}{table_html(report, verdict)}</section></main>"
        f"<script>{assets.TABLE_JS}</script></body></html>\n"
    )


def notebook(report: Measured) -> str:
    """What a notebook shows: the paper's figure as an image, the verdict, and the table folded away."""
    if not report.points:
        return "<p>empty signal report</p>"
    buffer = io.BytesIO()
    draw(report).savefig(buffer, format="png", facecolor="white")
    image = base64.b64encode(buffer.getvalue()).decode()
    verdict = check(report)
    return (
        '<div style="font:14px/1.45 system-ui,sans-serif">'
        f'<img alt="signal propagation of {html.escape(", ".join(report.models))}" style="max-width:100%" '
        f'src="data:image/png;base64,{image}">{told(verdict)}'
        f"<details><summary>{len(report.points)} points</summary>{table_html(report, verdict)}</details></div>"
    )


def table_html(report: Measured, verdict: Check) -> str:
    """The points as a plain HTML table: complete without JavaScript, sortable with it.

    Args:
        report: what was measured.
        verdict: whose findings mark the rows.

    Returns:
        HTML.
    """
    broken: dict[tuple[str, str, int], list[str]] = {}
    for f in verdict.findings:
        broken.setdefault((f.model, f.name, f.step), []).append(f.rule)
    columns = [c for c in _HEADERS if any(getattr(p, c[0]) not in (None, "") for p in report.points)]
    columns = [
        c
        for c in columns
        if not (c[0] == "step" and len(report.steps) == 1)
        and not (c[0] == "model" and len(report.models) == 1)
    ]
    head = "".join(
        f'<th scope="col" class="{"t" if key in _TEXT else "n"}"><button type="button" '
        f'title="{html.escape(tip)}">{html.escape(label)}</button></th>'
        for key, label, tip in columns
    )
    body = "".join(
        _row(p, [c[0] for c in columns], broken.get((p.model, p.name, p.step), [])) for p in report.points
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table of points"><table class="points">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(p: Point, columns: list[str], rules: list[str]) -> str:
    cells = []
    for key in columns:
        value: Any = getattr(p, key)
        if key == "shape":
            value = "×".join(map(str, value))
        text = html.escape(str(value) if key in _TEXT else number(value))
        tag = 'th scope="row"' if key == "name" else "td"
        if key == "name" and rules:
            text += "".join(
                f' <em title="{html.escape(RULES[r].what if r in RULES else r)}">{r}</em>' for r in rules
            )
        # Seven digits sort; three show.
        raw = "" if key in _TEXT or not isinstance(value, float) else f' data-v="{value:.7g}"'
        cells.append(f'<{tag} class="{"t" if key in _TEXT else "n"}"{raw}>{text}</{tag.split()[0]}>')
    classes = " ".join(filter(None, [p.role, "broken" if rules else ""]))
    return f'<tr class="{classes}">{"".join(cells)}</tr>'


def _second(report: Measured) -> str:
    return _SECOND if any("#" in p.name for p in report.points) else ""


def _notes(report: Measured) -> str:
    if not report.notes:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{html.escape(n)}</li>" for n in report.notes) + "</ul>"


def _json(data: Any) -> str:
    """JSON that may stand inside a script element: `</script>` in a name must not end it."""
    return json.dumps(_short(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _short(data: Any) -> Any:
    """Five digits are more than a screen has pixels."""
    if isinstance(data, dict):
        return {key: _short(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_short(value) for value in data]
    return float(f"{data:.5g}") if isinstance(data, float) else data
