"""What an initializer did to every layer, as rows and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One layer. Numbers that an initializer does not measure are NaN and are not shown."""

    path: str
    action: str
    """`"set"`, or why not: `"skipped"`, `"shared"`, `"frozen"`, `"refused"`, `"unreached"`, `"invisible"`."""
    reason: str = ""
    factor: float = math.nan
    """What the layer's weight was multiplied by (the mean over channels with `per_channel`)."""
    std_before: float = math.nan
    std: float = math.nan
    """Standard deviation of the whole output afterwards."""
    channel_var: float = math.nan
    """Biased variance within a channel afterwards, averaged over channels."""
    channel_mean_sq: float = math.nan
    """Squared mean of a channel afterwards, averaged over channels: the mean shift that unit std hides."""
    promised: float = math.nan
    """The root mean square that the initializer promises of the output."""
    rms: float = math.nan
    """The root mean square that was measured."""
    promised_cosine: float = math.nan
    """The cosine between two samples that the initializer promises of the output."""
    cosine: float = math.nan
    """The mean cosine between two samples that was measured."""


_NUMBERS = (
    *("factor", "std_before", "std", "channel_var", "channel_mean_sq"),
    *("promised", "rms", "promised_cosine", "cosine"),
)


class Report:
    """Rows in execution order; layers that no call reached come last. `str()` is a table.

    Args:
        title: who set what.
        rows: a row a layer.
        assumed: what the initializer took for granted, a line each.
        constants: numbers that it found, by name, such as a slope that it solved for.
    """

    def __init__(
        self,
        title: str,
        rows: Iterable[Row],
        assumed: Iterable[str] = (),
        constants: Mapping[str, float] | None = None,
    ):
        self.title = title
        self.rows = tuple(rows)
        self.assumed = tuple(assumed)
        self.constants = dict(constants or {})

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> Row:
        """The first row of the layer at `path`."""
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(path)

    def paths(self, action: str) -> tuple[str, ...]:
        """Layers that got this action, e.g. `report.paths("skipped")`."""
        return tuple(row.path for row in self.rows if row.action == action)

    def __str__(self) -> str:
        shown = [name for name in _NUMBERS if any(not math.isnan(getattr(row, name)) for row in self.rows)]
        table = [["layer", "action", *shown, "reason"]]
        for row in self.rows:
            numbers = (getattr(row, name) for name in shown)
            cells = ("" if math.isnan(number) else f"{number:.4g}" for number in numbers)
            table.append([row.path, row.action, *cells, row.reason])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
            for cells in table
        )
        found = ", ".join(f"{name} = {value:.6g}" for name, value in self.constants.items())
        notes = [f"assumed: {line}" for line in self.assumed]
        return "\n".join([self.title, *lines, *([found] if found else []), *notes])

    __repr__ = __str__
