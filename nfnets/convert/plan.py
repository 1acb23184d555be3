"""What a conversion will do, change by change, before anything is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from nfnets.convert.fused import after, held_at, like
from nfnets.errors import UserError
from nfnets.given import counted
from nfnets.scale.target import Target
from nfnets.structure.sites import Site
from nfnets.trace import Node

Build = Callable[[nn.Module], nn.Module]
Action = Literal["replace", "leave", "refuse", "scale", "wake"]


@dataclass(frozen=True, slots=True)
class Edit:
    """Put `build(old module)` at `path`."""

    path: str
    build: Build


@dataclass(frozen=True, slots=True)
class Start:
    """An initializer that runs on the converted copy before its targets are made to hold: `run(model, *inputs)`."""

    run: Callable[..., object]
    why: str


@dataclass(frozen=True, slots=True, init=False)
class Change:
    """One place in the model: what stands there afterwards, why, and how large its output is to be.

    Args:
        at: a site (a norm layer), a node of the graph (a convolution or linear), or a path.
        becomes: a function from the old module to what stands in its place, such as `lambda norm: nn.Identity()`. It
            runs when the model is converted, on the copy: use its argument, not variables of a loop, and put a new
            module there, never the old one changed (an `inplace` conversion that fails must be undone). What stands
            for a norm layer is moved to its device and type, and followed by what was fused into it, a dropout or an
            activation; γ, β and ε are lost unless the function takes them over. Or the name of what stands there,
            with `edits`.
        *edits: what is exchanged, if that is not `becomes`.
        target: how large the output of what stands there is to be.
        why: the reason, for the table.
        action: `"replace"`; `"leave"`, not the method's business; `"refuse"`, it should be replaced, but cannot;
            `"scale"`, the layer stays and has a target; `"wake"`, it changes its sign if it turns out to be dead.
        role: what the place is to the network; known of a site.
        targets: by path, where they are several. Of a norm layer with a fused activation the replacement stands one
            level below, at `norm`; `target` knows that.
        norm: class of what stands there now; known of a site or a node.
        reads: name of what it reads; known of a site.

    Example:
        >>> from nfnets.convert.plan import Change
        >>> Change("stem.bn", lambda norm: nn.Identity(), why="dropped").path
        'stem.bn'
    """

    path: str
    role: str
    action: Action
    replaced: str
    """What stands there afterwards."""
    reason: str
    norm: str
    """Class of what stands there now."""
    reads: str
    """What it reads: a module path or a function."""
    edits: tuple[Edit, ...]
    targets: Mapping[str, Target] = field(hash=False)

    def __init__(
        self,
        at: Site | Node | str,
        becomes: Build | str = "",
        *edits: Edit,
        target: Target | None = None,
        why: str = "",
        action: Action = "replace",
        role: str = "",
        targets: Mapping[str, Target] | None = None,
        norm: str = "",
        reads: str = "",
    ):
        if action not in get_args(Action):
            raise UserError(f"a change with action={action!r}: expected one of {', '.join(get_args(Action))}")
        path = at if isinstance(at, str) else at.path
        if isinstance(becomes, nn.Module):
            given = type(becomes).__name__
            raise UserError(
                f"the change of {path} becomes a {given}: expected a function that makes one, for every place its own; "
                f"pass lambda norm: {given}(…)"
            )
        held = path
        if isinstance(at, Site):
            role, norm, reads = role or at.role, norm or type(at.norm).__name__, reads or at.reads
            held = held_at(path, at.norm)
        elif isinstance(at, Node):
            norm = norm or type(at.module).__name__
        if not isinstance(becomes, str):
            edits = (Edit(path, _with_fused(becomes) if isinstance(at, Site) else becomes), *edits)
            name = getattr(becomes, "__name__", type(becomes).__name__)
            becomes = "a module" if name == "<lambda>" else name.strip("_")
        if action == "replace" and not edits:
            raise UserError(
                f"the change of {path} replaces nothing: expected a function from the old module to the new one, or "
                'edits; pass becomes=lambda norm: …, or action="leave"'
            )
        every = dict(targets or {}) | ({} if target is None else {held: target})
        values = (path, role, action, becomes, why, norm, reads, edits, every)
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    def left(self, reason: str) -> Change:
        """The same place, left as it is."""
        return Change(self.path, action="leave", why=reason, role=self.role, norm=self.norm, reads=self.reads)


def _with_fused(build: Build) -> Build:
    def built(norm: nn.Module) -> nn.Module:
        new = build(norm)
        if not isinstance(new, nn.Module) or new is norm:
            given = "the norm layer itself" if new is norm else f"a {type(new).__name__}"
            raise UserError(
                f"what a change builds from a {type(norm).__name__} is {given}: expected another module"
            )
        return after(norm, new.to(**like(norm)))

    return built


class Plan:
    """The changes of a conversion; iterable, and a table as text.

    Example:
        >>> from nfnets.convert import plan
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> rows = plan(model, __import__("torch").randn(2, 3, 8, 8))
        >>> [(row.path, row.role, row.action) for row in rows]
        [('1', 'trunk', 'replace')]
    """

    def __init__(
        self,
        method: str,
        options: dict[str, Any],
        rows: list[Change],
        others: list[Change | Start],
    ):
        self.method = method
        self.options = options
        self.rows = rows
        changes = [other for other in others if isinstance(other, Change)]
        self.layers = [change for change in changes if change.action == "replace"]
        """Convolutions and linears that change although no norm layer reads them alone."""
        self.starts = [other for other in others if isinstance(other, Start)]
        """Initializers that run before the targets are made to hold."""
        self.wake = [change.path for change in changes if change.action == "wake"]
        """Layers that change their sign if they turn out to be dead."""
        made = [change for change in [*rows, *changes] if change.action in ("replace", "scale")]
        self.targets = {path: target for change in made for path, target in change.targets.items()}
        """How large outputs are to be, by path."""

    def __iter__(self) -> Iterator[Change]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def edits(self) -> list[Edit]:
        """Everything that is exchanged, in order."""
        made = [change for change in [*self.rows, *self.layers] if change.action == "replace"]
        return [edit for change in made for edit in change.edits]

    @property
    def refused(self) -> list[Change]:
        """What should be replaced, but cannot."""
        return [row for row in self.rows if row.action == "refuse"]

    def summary(self) -> str:
        """One line: how many norm layers, what happens to them."""
        counts = Counter(row.action for row in self.rows)
        parts = [
            f"{counts[action]} to {action}" for action in ("replace", "leave", "refuse") if counts[action]
        ]
        chosen = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return (
            f"method={self.method}{f' ({chosen})' if chosen else ''}: {counted(len(self.rows), 'norm layer')}, "
            + (", ".join(parts) or "nothing to do")
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
