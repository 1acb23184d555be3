"""The report of a probe: a list of points, and the formats it is read in."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfnets import files
from nfnets.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.table import Table

    from nfnets.signal.rules import Check, Rule

SCHEMA = 1


@dataclass(frozen=True)
class Point:
    """One measured place of one model. `None` means not measured or not defined there; NaN means NaN was seen.

    Attributes:
        model: the name the caller gave the model.
        name: module path; a residual join carries the path of the module that adds; `#2` is a second call.
        kind: conv, linear, norm, activation, pool, join, module or function.
        role: stem, branch_end, join, head or "".
        feeds: kind of the first node that reads this output.
        depth: weight layers on the longest path from the input to here.
        block: 0 for the stem, j for the j-th residual join, else `None`.
        call: 0 for the first call of a module, 1 for the second, …
        step: the training step that was sampled (0 for `profile`).
        shape: of the output.
        dtype: of the output.
        count: elements per channel behind each mean and variance.
        mean_sq: average channel squared mean, mean_c(E[x_c]²).
        var: average channel variance, mean_c(Var[x_c]), biased.
        residual_var: at a join, the average channel variance at the branch end before SkipInit and α.
        predicted_mean_sq: what theory expects for `mean_sq`.
        predicted_var: what theory expects for `var`.
        predicted_residual_var: what theory expects for `residual_var`.
        total_mean: mean over everything.
        total_var: variance over everything.
        dead: fraction of channels whose output does not vary over the batch.
        min: smallest value.
        max: largest value.
        nonfinite: a NaN or an inf was seen.
        headroom_fp16: log2(65504 / max|x|), bits left before fp16 overflows.
        headroom_bf16: the same for bfloat16.
        cosine: mean cosine similarity between samples; from a probe, at the trunk and the branch ends only.
        rank: effective rank of the batch (participation ratio of its Gram matrix), at most min(N, 16).
        weight_norm: L2 norm of the layer's stored weight.
        update_ratio: ‖ΔW‖ / ‖W‖ from this step to the next.
        clipped: fraction of the weight's units that AGC clipped, over all steps until the next sampled one.
        grad_mean_sq: `mean_sq` of the gradient of the loss by this output.
        grad_var: `var` of that gradient.
        grad_norm: its L2 norm.
        grad_min: its smallest value.
        grad_max: its largest value.
        weight_grad_norm: L2 norm of the weight's gradient.
        training_var: from `profile`, what `var` is with dropout and stochastic depth on.
    """

    model: str
    name: str
    kind: str
    role: str = ""
    feeds: str = ""
    depth: int = 0
    block: int | None = None
    call: int = 0
    step: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    count: int = 0
    mean_sq: float | None = None
    var: float | None = None
    residual_var: float | None = None
    predicted_mean_sq: float | None = None
    predicted_var: float | None = None
    predicted_residual_var: float | None = None
    total_mean: float | None = None
    total_var: float | None = None
    dead: float | None = None
    min: float | None = None
    max: float | None = None
    nonfinite: bool = False
    headroom_fp16: float | None = None
    headroom_bf16: float | None = None
    cosine: float | None = None
    rank: float | None = None
    weight_norm: float | None = None
    update_ratio: float | None = None
    clipped: float | None = None
    grad_mean_sq: float | None = None
    grad_var: float | None = None
    grad_norm: float | None = None
    grad_min: float | None = None
    grad_max: float | None = None
    weight_grad_norm: float | None = None
    training_var: float | None = None


COLUMNS = tuple(f.name for f in fields(Point))
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _encode(value: Any) -> Any:
    """JSON has no NaN: a measured one becomes a string, so that it cannot be taken for `null`, not measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _decode(value: Any, name: str) -> Any:
    if name == "shape":
        return tuple(value)
    if isinstance(value, str) and name not in ("model", "name", "kind", "role", "feeds", "dtype"):
        return _SPECIAL[value]
    return value


@dataclass
class SignalReport:
    """What a probe or a profile measured: rows, and the ways to read, draw, save and judge them.

    Args:
        points: rows in execution order, model by model, step by step.
        notes: what could not be estimated, and why, one line each.
        meta: how it was measured (shapes, versions).

    Example:
        >>> report = SignalReport([Point("net", "conv1", "conv", var=1.0)])
        >>> report.models, report["conv1"].var
        (('net',), 1.0)
    """

    points: list[Point]
    notes: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names, in the order they were given."""
        return tuple(dict.fromkeys(p.model for p in self.points))

    @property
    def steps(self) -> tuple[int, ...]:
        """The sampled steps, ascending."""
        return tuple(sorted({p.step for p in self.points}))

    def select(
        self,
        model: str | None = None,
        step: int | None = None,
        role: str | None = None,
        kind: str | None = None,
    ) -> list[Point]:
        """The points that match everything given, in execution order.

        Args:
            model: of this model.
            step: of this step; the latest when a report has several and none is given.
            role: with this role.
            kind: of this kind.

        Returns:
            A new list.

        Example:
            >>> SignalReport([Point("a", "x", "conv"), Point("b", "x", "conv")]).select(model="b")[0].model
            'b'
        """
        if step is None and self.points:
            step = self.steps[-1]
        return [
            p
            for p in self.points
            if p.step == step
            and (model is None or p.model == model)
            and (role is None or p.role == role)
            and (kind is None or p.kind == kind)
        ]

    def __getitem__(self, name: str) -> Point:
        """The latest point of this name (`model/name` where several models share it)."""
        for p in reversed(self.points):
            if name in (p.name, f"{p.model}/{p.name}"):
                return p
        from nfnets.errors import unknown

        raise unknown("point", name, {p.name for p in self.points})

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
            row = {**asdict(p), "shape": "x".join(map(str, p.shape))}
            writer.writerow(["" if row[c] is None else row[c] for c in COLUMNS])
        return files.write(path, text.getvalue())

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, one row per point, the columns of `Point`."""
        import pandas as pd

        return pd.DataFrame([asdict(p) for p in self.points], columns=list(COLUMNS))

    def to_tensorboard(
        self,
        writer: Any,
        names: Sequence[str] = ("mean_sq", "var", "residual_var", "grad_var", "update_ratio", "clipped"),
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
            include_plotlyjs: embed plotly.js (packed, 2 MB) before it.

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
                not there: a page is then a few KB in place of 2 MB, and needs that file where it is.

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
        from nfnets.signal.rules import check

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
