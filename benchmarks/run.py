"""Every `bench_*.py` beside this file: one table of ratios, targets met or not, and a JSON per hardware.

    python -m benchmarks.run [--small] [name …]

A `bench_*.py` has `rows() -> list[dict]` with the keys what, ours_ms, peer, peer_ms, ratio, target (such as "≤ 1.05×",
empty for none) and perhaps unit (for what is not milliseconds). `SMALL` holds arguments with which it takes seconds:
`--small` runs it so, to see that it runs, and writes nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nfnets import files

HERE = Path(__file__).parent


def hardware() -> str:
    """The GPU, or the processor with its number of threads.

    Example:
        >>> bool(hardware())
        True
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1] for line in _cpu_info() if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0].strip()}, {torch.get_num_threads()} threads"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def met(ratio: float, target: str) -> bool | None:
    """Whether a ratio meets a target; None without one.

    Example:
        >>> met(1.02, "≤ 1.05×"), met(18.0, "≥ 20× faster"), met(3.0, "")
        (True, False, None)
    """
    found = re.match(r"\s*([≤≥<>])\s*([\d.]+)", target)
    if found is None:
        return None
    bound = float(found[2])
    return {"≤": ratio <= bound, "≥": ratio >= bound, "<": ratio < bound, ">": ratio > bound}[found[1]]


def main(names: list[str]) -> int:
    found, small = sorted(path.stem for path in HERE.glob("bench_*.py")), "--small" in names
    names = [name for name in names if name != "--small"]
    chosen = [name if name.startswith("bench_") else f"bench_{name}" for name in names] or found
    if unknown := sorted(set(chosen) - set(found)):
        print(f"unknown benchmark {', '.join(unknown)}: known are {', '.join(found)}", file=sys.stderr)
        return 2
    console = Console()
    results: dict[str, list[dict[str, Any]]] = {}
    for name in chosen:
        with console.status(name):
            module = importlib.import_module(f"benchmarks.{name}")
            rows = module.rows(**(module.SMALL if small else {}))
            results[name] = [row | {"torch": torch.__version__} for row in rows]
    where = hardware()
    table = Table(title=f"{where}, torch {torch.__version__}")
    for heading in ("what", "ours", "peer", "", "ratio", "target", "met"):
        table.add_column(heading, justify="right" if heading in ("ours", "", "ratio") else "left")
    for row in (row for rows in results.values() for row in rows):
        unit, verdict = row.get("unit", "ms"), met(row["ratio"], row["target"])
        ours, theirs = (f"{row[side]:.1f} {unit}" for side in ("ours_ms", "peer_ms"))
        shown = {True: "[green]yes", False: "[red]no", None: ""}[verdict]
        table.add_row(row["what"], ours, row["peer"], theirs, f"{row['ratio']:.2f}", row["target"], shown)
    console.print(table)
    if small:
        return 0
    path = HERE / "results" / (re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-") + ".json")
    path.parent.mkdir(exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept["hardware"] = {"name": where, "cores": os.cpu_count()}
    files.write(path, json.dumps(kept | results, indent=1, ensure_ascii=False) + "\n")
    console.print(f"written to {path.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
