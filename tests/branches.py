"""Prints what share of the branches in each package the tests took: `python tests/branches.py build/coverage.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("nfnets", "init", "train")
GOAL = 0.9


def counts(report: dict) -> Iterator[tuple[str, str, int, int]]:
    """Package, file, branches taken, branches there are; of an installed package, too."""
    for name, found in report["files"].items():
        path = name.replace("\\", "/").replace("nfnets/init/", "init/").replace("nfnets/train/", "train/")
        package = next(p for p in ("init", "train", "nfnets") if f"/{p}/" in f"/{path}")
        summary = found["summary"]
        yield package, path, summary["covered_branches"], summary["num_branches"]


def main(path: str) -> int:
    """The table, and 1 if a package is below the goal or was not measured."""
    rows = list(counts(json.loads(Path(path).read_text())))
    low = False
    for package in PACKAGES:
        own = [row for row in rows if row[0] == package]
        taken, all_ = sum(row[2] for row in own), sum(row[3] for row in own)
        low |= taken < GOAL * all_ or all_ == 0  # none at all: paths that `counts` does not know
        print(f"{package}: {taken} of {all_} branches, {taken / max(1, all_):.1%}")
        for _, file, some, total in sorted(own, key=lambda row: row[2] - row[3])[:12]:
            if some < total:
                print(f"    {total - some:4} of {total:4} not taken  {file}")
    return int(low)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
