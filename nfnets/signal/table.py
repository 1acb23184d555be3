"""The report in a terminal, by rich."""

from __future__ import annotations

import io

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nfnets.signal.logged import shown_rows
from nfnets.signal.measured import Measured, Point
from nfnets.signal.rules import check

_COLUMNS = (
    ("sq. mean", "mean_sq"),
    ("variance", "var"),
    ("predicted", "predicted_var"),
    ("residual", "residual_var"),
    ("predicted", "predicted_residual_var"),
    ("fp16 bits", "headroom_fp16"),
    ("cosine", "cosine"),
    ("in training", "training_var"),
)
_GRADIENT = (("grad. var", "grad_var"), ("grad. norm", "grad_norm"))


def number(value: object) -> str:
    """Three significant digits, an empty cell for what was not measured.

    Example:
        >>> number(0.68169), number(None), number(1.23456e-9)
        ('0.682', '', '1.23e-09')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def rows(report: Measured, all_points: bool = False) -> list[Point]:
    """The rows to show: blocks and head, or everything."""
    return list(report.points) if all_points else shown_rows(report.points)


def table(report: Measured, all_points: bool = False) -> Table:
    """A rich table; rows that break a default rule are red and say which.

    Args:
        report: what to show.
        all_points: every point instead of stem, joins and head.

    Returns:
        The table.
    """
    shown = rows(report, all_points)
    columns = [c for c in (*_COLUMNS, *_GRADIENT) if any(getattr(p, c[1]) is not None for p in shown)]
    broken: dict[tuple[str, str, int], list[str]] = {}
    for f in check(report).findings if report.points else ():
        broken.setdefault((f.model, f.name, f.step), []).append(f.rule)
    many, timeline = len(report.models) > 1, len(report.steps) > 1
    out = Table(title="Signal propagation", title_justify="left", header_style="bold", box=SIMPLE)
    for header in [*(["model"] if many else []), *(["step"] if timeline else []), "point", "role"]:
        out.add_column(header, no_wrap=True)
    for header, _ in columns:
        out.add_column(header, justify="right", no_wrap=True)
    if broken:
        out.add_column("breaks")
    previous = None
    for p in shown:
        if previous is not None and (p.model, p.step) != previous:
            out.add_section()
        previous = (p.model, p.step)
        rules = broken.get((p.model, p.name, p.step), [])
        cells = [*([p.model] if many else []), *([str(p.step)] if timeline else []), p.name, p.role or p.kind]
        cells += [number(getattr(p, name)) for _, name in columns]
        cells += [", ".join(rules)] if broken else []
        # Text, not str: a layer name in brackets is not markup.
        out.add_row(*(Text(c) for c in cells), style="red" if rules else None)
    return out


def render(report: Measured, width: int = 140) -> str:
    """The table as plain text, for `print` and logs.

    Args:
        report: what to show.
        width: characters a line.

    Returns:
        Text without escape codes.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table(report))
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    return "\n".join(s.rstrip() for s in (text + "\n".join(report.notes)).splitlines())
