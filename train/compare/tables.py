"""Terminal tables of plans: what a conversion will do, and what a sweep will."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from nfnets.convert import Plan
from nfnets.train.compare.estimate import Planned
from nfnets.train.compare.protocol import rate


def plan_table(plan: Plan, title: str = "") -> Table:
    """A conversion plan, a row per norm layer."""
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", caption=Text(plan.summary()))
    table.title = Text(title) if title else None
    headings = ["norm layer", "role", "action", "becomes", "why"]
    uniform = (
        len({row.action for row in plan}) == 1
    )  # then the summary says it, and narrow terminals have room
    if uniform:
        headings.remove("action")
    for heading in headings:
        table.add_column(heading, no_wrap=heading in ("norm layer", "action"))
    colors = {"refuse": "red", "leave": "yellow"}
    for row in plan:
        cells = [row.path, row.role, *([] if uniform else [row.action]), row.replaced, row.reason]
        # Text, not str: a name in brackets is not markup.
        table.add_row(*map(Text, cells), style=colors.get(row.action))
    return table


def planned_table(planned: Sequence[Planned], jobs: int = 1) -> Table:
    """The runs of a sweep with their estimated time, and the time of all with so many runs at once."""
    left = sum(run.seconds for run in planned)
    together = f", at best {duration(left / jobs)} with {jobs} runs at once" if jobs > 1 else ""
    waiting = sum(not run.finished for run in planned)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=f"{waiting} of {len(planned)} runs to do, about {duration(left)} of training{together}",
    )
    for heading in ("arm", "batch", "lr", "seed", "steps", "time"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for run in planned:
        lr = "the best" if run.lr is None else rate(run.lr)
        time = "finished" if run.finished else duration(run.seconds)
        table.add_row(Text(run.arm), str(run.batch_size), lr, str(run.seed), f"{run.steps:,}", time)
    return table


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(8), duration(95), duration(7300)
        ('8 s', '1 min 35 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
