"""The report of a probe: what was measured, and the formats it is read in."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfnets import files
from nfnets.errors import UserError
from nfnets.signal.logged import STATISTICS
from nfnets.signal.measured import COLUMNS, Measured, Point
from nfnets.signal.rules import Check, Rule, check

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.table import Table

SCHEMA = 1
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _encode(value: Any) -> Any:
    """JSON has no NaN: a measured one becomes a string, so that it cannot be taken for `null`, not measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _decode(value: Any, name: str) -> Any:
    if name in ("shape", "weight_shape"):
        return tuple(value)
    if isinstance(value, str) and name not in ("model", "name", "kind", "role", "feeds", "dtype"):
        return _SPECIAL[value]
    return value


@dataclass
class SignalReport(Measured):
    """What a probe or a profile measured: points, and the ways to read, draw, save and judge them.

    Args:
        points: points in execution order, model by model, step by step.
        notes: what could not be estimated, and why, one line each.
        meta: how it was measured (shapes, versions).

    Example:
        >>> report = SignalReport([Point("net", "conv1", "conv", var=1.0)])
        >>> report.models, report["conv1"].var
        (('net',), 1.0)
    """

    # -- data ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        rows = [{k: _encode(v) for k, v in asdict(p).items()} for p in self.points]
        return {"schema": SCHEMA, "meta": self.meta, "notes": self.notes, "points": rows}

    @classmethod
    def from_json(cls, source: str | Path) -> SignalReport:
        """Reads what `to_json` wrote.

        Args:
            source: path of the file.

        Returns:
            An equal report.

        Raises:
            UserError: no such file, or not one of ours.
        """
        try:
            data = json.loads(Path(source).read_text(encoding="utf-8"))
            rows = [Point(**{k: _decode(v, k) for k, v in row.items()}) for row in data["points"]]
            return cls(rows, list(data["notes"]), dict(data["meta"]))
        except OSError as error:
            raise UserError(
                f"cannot read {source}: {error.strerror}; give a file written by to_json"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{source} is not a signal report: expected a file written by to_json") from error

    def to_json(self, path: str | Path) -> Path:
        """Writes the report as JSON; non-finite measurements become the strings "nan", "inf", "-inf"."""
        return files.write(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def to_csv(self, path: str | Path) -> Path:
        """Writes one row per point; what was not measured stays empty."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for p in self.points:
            shapes = {name: "x".join(map(str, getattr(p, name))) for name in ("shape", "weight_shape")}
            row = asdict(p) | shapes
            writer.writerow(["" if row[c] is None else row[c] for c in COLUMNS])
        return files.write(path, text.getvalue())

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, one row per point, the columns of `Point`."""
        import pandas as pd

        return pd.DataFrame([asdict(p) for p in self.points], columns=list(COLUMNS))

    def to_tensorboard(
        self,
        writer: Any,
        names: Sequence[str] = STATISTICS,
    ) -> None:
        """Adds every point's statistics as scalars `model/point/statistic`.

        Args:
            writer: has TensorBoard's `add_scalar(tag, value, step)`.
            names: which statistics.
        """
        for p in self.points:
            for name in names:
                value = getattr(p, name)
                if value is not None:
                    writer.add_scalar(f"{p.model}/{p.name}/{name}", value, p.step)

    # -- views --------------------------------------------------------------------------------------------

    def plot(self, path: str | Path | None = None) -> Figure:
        """The three-panel figure of the NF-ResNet paper.

        Average channel squared mean, average channel variance and residual average channel variance over the
        residual blocks; dashed what theory predicts.

        Args:
            path: also save it there (the suffix says the format: .png, .pdf, .svg).

        Returns:
            The matplotlib figure.

        Raises:
            UserError: the path cannot be written.

        Paper: arXiv 2101.08692, figures 1 to 3.
        """
        from nfnets.signal.figure import draw

        figure = draw(self)
        if path is not None:
            if (
                not Path(path).suffix or Path(path).is_dir()
            ):  # matplotlib would write beside it, under another name
                raise UserError(f"cannot write {path}: no file name with a suffix; give a .png, .pdf or .svg")
            try:
                files.write(path, lambda partial: figure.savefig(partial))
            except UserError:
                raise
            except ValueError as error:  # a format that matplotlib does not know
                raise UserError(f"cannot write {path}: {error}; give a .png, .pdf or .svg") from error
        return figure

    def panels_html(self, include_plotlyjs: bool = False) -> str:
        """The interactive panels as one `<div>`, for a page that has plotly.js already.

        Args:
            include_plotlyjs: embed plotly.js (packed, 0.5 MB) before it.

        Returns:
            HTML without `<html>` or `<body>`.
        """
        from nfnets.signal.page import panels
        from nfnets.signal.plotlyjs import embedded

        return panels(self, embedded() if include_plotlyjs else "")

    def to_html(self, path: str | Path, plotlyjs: str | Path | None = None) -> Path:
        """Writes one self-contained page: panels, verdict, sortable table; opens offline.

        Args:
            path: the file to write.
            plotlyjs: a file in the same folder or above it for several pages to share plotly.js by, written if it is
                not there: a page is then smaller by half a megabyte, and needs that file where it is.

        Returns:
            Its path.

        Raises:
            UserError: the path cannot be written.
        """
        from nfnets.signal.page import page
        from nfnets.signal.plotlyjs import linked

        return files.write(path, page(self, None if plotlyjs is None else linked(Path(plotlyjs), Path(path))))

    def check(self, rules: Sequence[str | Rule] | None = None) -> Check:
        """Judges the report by named rules; see `nfnets.signal.rules`.

        Args:
            rules: names or `Rule` objects; all default rules when omitted.

        Returns:
            A `Check`: true when everything passed, else it names the layers and a remedy.

        Raises:
            UserError: an unknown rule, or nothing to judge.
        """
        return check(self, rules)

    def table(self, all_points: bool = False) -> Table:
        """A rich table of the stem, the joins and the head, or of every point."""
        from nfnets.signal.table import table

        return table(self, all_points)

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        from nfnets.signal.table import render

        return render(self)

    def _repr_html_(self) -> str:
        from nfnets.signal.page import notebook

        return notebook(self)


def merge_reports(reports: Iterable[SignalReport]) -> SignalReport:
    """One report of several, in the order given."""
    out = SignalReport([])
    for report in reports:
        out.points += report.points
        out.notes += report.notes
        out.meta |= report.meta
    return out
