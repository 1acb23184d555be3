"""What a conversion will do, norm layer by norm layer, before anything is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

Build = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True, slots=True)
class Edit:
    """Put `build(old module)` at `path`."""

    path: str
    build: Build


@dataclass(frozen=True, slots=True)
class Row:
    """One norm layer: what happens to it and why."""

    path: str
    role: str
    action: str
    """`"replace"`, `"leave"` (not the method's business) or `"refuse"` (it should be replaced, but cannot)."""
    replaced: str
    """What stands there afterwards."""
    reason: str
    norm: str = ""
    """Class of the norm layer."""
    reads: str = ""
    """What it reads: a module path or a function."""
    edits: tuple[Edit, ...] = ()


class Plan:
    """The rows of a conversion; iterable, and a table as text.

    Example:
        >>> from nfnets.convert import plan
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> rows = plan(model, __import__("torch").randn(2, 3, 8, 8))
        >>> [(row.path, row.role, row.action) for row in rows]
        [('1', 'trunk', 'replace')]
    """

    def __init__(self, method: str, options: dict[str, Any], rows: list[Row], layers: list[Row]):
        self.method = method
        self.options = options
        self.rows = rows
        self.layers = layers
        """Convolutions and linears that change although no norm layer reads them alone."""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def refused(self) -> list[Row]:
        """Rows that should be replaced, but cannot."""
        return [row for row in self.rows if row.action == "refuse"]

    def summary(self) -> str:
        """One line: how many norm layers, what happens to them."""
        counts = Counter(row.action for row in self.rows)
        parts = [
            f"{counts[action]} to {action}" for action in ("replace", "leave", "refuse") if counts[action]
        ]
        chosen = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"method={self.method}{f' ({chosen})' if chosen else ''}: {len(self.rows)} norm layers, " + (
            ", ".join(parts) or "nothing to do"
        )

    def records(self) -> list[dict[str, str]]:
        """Rows as dictionaries of text, for tables and JSON."""
        names = ("path", "norm", "role", "reads", "action", "replaced", "reason")
        return [{name: getattr(row, name) for name in names} for row in [*self.rows, *self.layers]]

    def __str__(self) -> str:
        titles = {
            "path": "norm layer",
            "role": "role",
            "reads": "reads",
            "action": "action",
            "replaced": "becomes",
        }
        titles["reason"] = "why"
        records = self.records()
        widths = {k: max([len(t), *(len(r[k]) for r in records)]) for k, t in titles.items()}
        line = lambda cells: "  ".join(cells[k].ljust(widths[k]) for k in titles).rstrip()  # noqa: E731
        rule = {k: "─" * width for k, width in widths.items()}
        return "\n".join([line(titles), line(rule), *(line(record) for record in records), self.summary()])

    __repr__ = __str__
