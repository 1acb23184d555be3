"""Keep what an experiment found: verdict, figures and every run's numbers, without weights and logs.

    python -m experiments.collect runs/batch-size docs/results/batch-size

Each `results.json` below the first folder becomes one file of the second, by its path; a run's whole configuration is
left out, since the experiment and the run's arm, rate, batch size and seed give it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from nfnets import files

LEFT_OUT = {"config", "folder", "reliability", "unreadable"}


def compact(results: dict[str, Any]) -> dict[str, Any]:
    """The results without what follows from the rest."""
    runs = [{k: v for k, v in run.items() if k not in LEFT_OUT} for run in results["runs"]]
    return results | {"runs": runs}


def text(results: dict[str, Any]) -> str:
    """JSON with a line for each run."""
    rest = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1)
    lines = ",\n  ".join(json.dumps(run) for run in results["runs"])
    return f'{rest[:-2]},\n "runs": [\n  {lines}\n ]\n}}\n'


def collect(source: Path, target: Path) -> list[Path]:
    """Copy what is kept; returns the files written.

    Args:
        source: An experiment's `--out`.
        target: A folder, created if need be.
    """
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for file in sorted(source.rglob("*")):
        parts = file.relative_to(source).parts
        if "runs" in parts:
            continue
        if file.name == "results.json":
            kept = target / ("-".join([*parts[:-1], file.name]))
            found = text(compact(json.loads(file.read_text())))
            # Where the folder lay says nothing to others: weights to start from may be named by it.
            files.write(kept, found.replace(str(source.resolve()), source.resolve().name))
        elif len(parts) == 1 and file.suffix in (".md", ".png", ".json"):
            kept = target / file.name
            shutil.copyfile(file, kept)
        else:
            continue
        written.append(kept)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    for file in collect(options.source, options.target):
        print(file)


if __name__ == "__main__":
    main()
