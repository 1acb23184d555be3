"""The zoo: every BatchNorm model of timm and torchvision × every conversion method × every check.

    python -m benchmarks.zoo [--family resnet] [--limit 20] [--method nf] [--again failed] [--publish]
    python -m benchmarks.zoo --others        # nets of other libraries, by `nf` and `fold`

Records are appended to OUT/zoo.jsonl as they come; what is there already, or in the published report, is not run
again. OUT/zoo.json and OUT/zoo.html (zoo_others.*) are a pure function of both; `--report` only writes these,
`--publish` also puts them into docs/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every worker

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.zoo import catalog, others, store
from benchmarks.zoo.build import GIANT, Entry
from benchmarks.zoo.page import START, write_page, write_table
from benchmarks.zoo.pool import GIB, Limits, Pool
from benchmarks.zoo.run import BASE, METHODS, run_model

_ROOT = Path(__file__).parents[2]
_PUBLISHED = _ROOT / "docs"


@dataclass(frozen=True)
class Zoo:
    """Which models, by which methods, under which name."""

    name: str
    title: str
    catalog: Path
    methods: tuple[str, ...]
    order: Callable[[list[Entry]], list[Entry]]


TIMM = Zoo("zoo", "The zoo", catalog.PATH, METHODS, catalog.broadly)
OTHERS = Zoo("zoo_others", "The zoo of other libraries", catalog.OTHERS, ("nf", "fold"), catalog.in_blocks)


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 unless it was asked for something unknown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument(
        "--others", action="store_true", help="other libraries instead of timm and torchvision"
    )
    parser.add_argument("--family", action="append", help="only families (timm's module names) that match")
    parser.add_argument(
        "--model", action="append", help="only models whose name, with or without source, matches"
    )
    parser.add_argument("--method", action="append", choices=METHODS, help="only these methods")
    parser.add_argument(
        "--limit", type=int, help="only the first so many models, each family's smallest first"
    )
    parser.add_argument(
        "--again", choices=("failed", "all"), help="run again what failed, or everything chosen"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="by default runs/zoo or runs/zoo_others")
    parser.add_argument("--report", action="store_true", help="run nothing, only write the report")
    parser.add_argument("--publish", action="store_true", help="copy the report to docs/")
    options = parser.parse_args(arguments)
    zoo = OTHERS if options.others else TIMM
    options.out = options.out or _ROOT / "runs" / zoo.name
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "zoo.jsonl"
    entries = zoo.order(catalog.load(zoo.catalog))
    before = store.published(_PUBLISHED / f"{zoo.name}.json", entries)
    if not options.report:
        chosen = _chosen(entries, options)
        if missing := sorted({entry.source for entry in entries if not others.installed(entry.source)}):
            print(f"not installed, so left out: {', '.join(missing)} (make zoo-others installs them)")
        if not chosen:
            print(f"no model matches --family {options.family} --model {options.model}", file=sys.stderr)
            return 2
        _run(chosen, options, options.method or list(zoo.methods), log, before)
    report = store.summarize(entries, [*before, *store.read(log)], zoo.methods, zoo.title)
    store.write_json(report, options.out / f"{zoo.name}.json")
    write_page(report, options.out / f"{zoo.name}.html")
    if options.publish:
        for name in (f"{zoo.name}.json", f"{zoo.name}.html"):
            shutil.copy(options.out / name, _PUBLISHED / name)
        if START in (page := _PUBLISHED / f"{zoo.name}.md").read_text():
            write_table(report, page)
    print(store.headline(report))
    return 0


def _chosen(entries: list[Entry], options: argparse.Namespace) -> list[Entry]:
    def wanted(entry: Entry) -> bool:
        families, models = options.family, options.model
        if not others.installed(entry.source):
            return False
        in_family = not families or any(fnmatch(entry.family, pattern) for pattern in families)
        named = not models or any(fnmatch(entry.name, p) or fnmatch(entry.key, p) for p in models)
        return in_family and named

    return [entry for entry in entries if wanted(entry)][: options.limit]


def _run(
    entries: list[Entry],
    options: argparse.Namespace,
    methods: list[str],
    log: Path,
    before: list[dict[str, Any]],
) -> None:
    known = store.latest([*before, *store.read(log)])
    redo = {"all": lambda record: True, "failed": store.failed, None: lambda record: False}[options.again]
    tasks = []
    for entry in entries:
        done = {m for m in methods if (r := known.get((entry.key, m))) is not None and not redo(r)}
        if left := [m for m in methods if m not in done]:
            tasks.append((entry, left))
    console = Console()
    columns = (TextColumn("{task.description:48}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with log.open("a") as file, Progress(*columns, console=console) as progress:
        total = sum(len(left) for _, left in tasks)
        bar = progress.add_task("starting", total=total)
        ended = 0

        def record(value: dict[str, Any]) -> None:
            nonlocal ended
            file.write(store.line(value))
            file.flush()
            if value["method"] == BASE:
                return
            ended += 1
            progress.advance(bar)
            if store.failed(value):
                progress.print(store.describe(value), highlight=False, markup=False, soft_wrap=True)
            if not console.is_terminal and ended % 20 == 0:
                progress.print(f"{ended} of {total}", highlight=False)

        def starts(model: str, method: str) -> None:
            progress.update(bar, description=f"{model} {method}")

        small = [task for task in tasks if task[0].parameters <= GIANT]
        giants = [task for task in tasks if task[0].parameters > GIANT]
        for share, workers, minutes in ((small, options.workers, 5), (giants, 1, 15)):
            limits = Limits(
                memory=15 * GIB / workers, seconds=60 * minutes, tasks=100 if options.others else 20
            )
            pool = Pool(run_model, workers, limits, record)
            pool.map(share, starts)
            progress.print(f"peak memory of the workers together: {pool.peak / GIB:.1f} GiB", highlight=False)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the workers go too
    sys.exit(main())
