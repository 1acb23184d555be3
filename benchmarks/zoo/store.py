"""The records on disk, and the report as a pure function of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.zoo.build import Entry
from benchmarks.zoo.run import BASE, CHECKS, METHODS
from nfnets import files

Record = dict[str, Any]


def line(record: Record) -> str:
    """A record as one line of JSON."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read(path: Path) -> list[Record]:
    """All whole lines of a log; a last line that was cut off is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def published(path: Path, entries: Iterable[Entry]) -> list[Record]:
    """The records that a report was made from, but for the details of checks that passed: a run goes on from there.

    Args:
        path: a report that `write_json` wrote; nothing comes from one that is not there.
        entries: the models; rows of others are left out.
    """
    if not path.exists():
        return []
    rows = {(row["source"], row["name"]): row["methods"] for row in json.loads(path.read_text())["rows"]}
    found = []
    for entry in entries:
        for method, cell in rows.get((entry.source, _name(entry)), {}).items():
            passed: Record = {name: {"passed": True, "detail": ""} for name in cell["passed"]}
            failing = {name: {"passed": False, "detail": detail} for name, detail in cell["failed"].items()}
            if "signal" in passed:
                passed["signal"]["detail"] = cell["signal"]
            ended = {"pass": "converted", "fail": "converted"}
            found.append(
                {
                    "model": entry.key,
                    "method": method,
                    "outcome": ended.get(cell["verdict"], cell["verdict"]),
                    "reason": cell["reason"],
                    "checks": passed | failing,
                    "seconds": cell["seconds"],
                }
            )
    return found


def latest(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The last record of each model and method."""
    return {(record["model"], record["method"]): record for record in records}


def verdict(record: Record) -> str:
    """`"pass"`, `"fail"`, `"refused"`, `"error"` or `"killed"`."""
    if record["outcome"] != "converted":
        return str(record["outcome"])
    return "pass" if all(check["passed"] for check in record["checks"].values()) else "fail"


def failed(record: Record) -> bool:
    """Whether something is wrong: a check, an exception, a limit. A refusal is not."""
    broken = any(not check["passed"] for check in record["checks"].values())
    return broken or verdict(record) in ("fail", "error", "killed")


def describe(record: Record) -> str:
    """One line about what went wrong."""
    wrong = [f"{name}: {check['detail']}" for name, check in record["checks"].items() if not check["passed"]]
    what = " | ".join(wrong) or record.get("reason", "")
    return f"{record['model']} {record['method']} {verdict(record)}: {what}"


def summarize(
    entries: list[Entry], records: Iterable[Record], methods: Sequence[str] = METHODS, title: str = "The zoo"
) -> Record:
    """The report: counts by method, and a row for each model, not yet measured ones too."""
    known = latest(records)
    rows = [_row(entry, known, methods) for entry in entries]
    rows.sort(key=lambda row: (row["source"], row["family"], row["parameters"], row["name"]))
    by_source = {
        source: _counts([row for row in rows if row["source"] == source], methods)
        for source in dict.fromkeys(row["source"] for row in rows)
    }
    by_check = {
        check: {
            method: [
                sum(check in r["passed"] for r in _ran(rows, method)),
                sum(check in r["passed"] or check in r["failed"] for r in _ran(rows, method)),
            ]
            for method in methods
        }
        for check in CHECKS
    }
    reasons = Counter(
        (method, _generic(row["methods"][method]["reason"]))
        for row in rows
        for method in methods
        if row["methods"].get(method, {}).get("verdict") == "refused"
    )
    return {
        "title": title,
        "versions": _versions(by_source),
        "methods": list(methods),
        "checks": CHECKS,
        "models": len(rows),
        "measured": sum(bool(row["methods"]) for row in rows),
        "counts": _counts(rows, methods),
        "by_source": by_source,
        "by_check": by_check,
        "refusals": [
            {"method": method, "reason": reason, "models": count}
            for (method, reason), count in reasons.most_common()
        ],
        "rows": rows,
    }


def _versions(sources: Iterable[str]) -> dict[str, str]:
    """Of torch and of the distributions that the models come from, where they are installed."""
    distributions = _distributions()
    found = {}
    for package in ("torch", *sources):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(distributions.get(package, [package])[0])
    return found


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _counts(rows: list[Record], methods: Sequence[str]) -> dict[str, dict[str, int]]:
    return {
        m: dict(Counter(row["methods"].get(m, {}).get("verdict", "pending") for row in rows)) for m in methods
    }


def _ran(rows: list[Record], method: str) -> list[Record]:
    return [row["methods"][method] for row in rows if method in row["methods"]]


def _row(entry: Entry, known: dict[tuple[str, str], Record], methods: Sequence[str]) -> Record:
    cells = {m: _cell(known[entry.key, m]) for m in methods if (entry.key, m) in known}
    return {
        "name": _name(entry),
        "source": entry.source,
        "family": entry.family,
        "kind": entry.kind,
        "parameters": entry.parameters,
        "norms": entry.norms,
        "shape": list(entry.shape),
        "methods": cells,
    }


def _name(entry: Entry) -> str:
    return entry.name + (" (frozen)" if entry.frozen else "")


def _cell(record: Record) -> Record:
    """A model × method: names of what passed, details of what failed, the worst signal ratio."""
    found = record["checks"]
    return {
        "verdict": "error" if _refused_but_broken(record) else verdict(record),
        "reason": record.get("reason", ""),
        "passed": [name for name, check in found.items() if check["passed"]],
        "failed": {name: check["detail"] for name, check in found.items() if not check["passed"]},
        "signal": found.get("signal", {}).get("detail", ""),
        "seconds": record["seconds"],
    }


def _refused_but_broken(record: Record) -> bool:
    return record["outcome"] == "refused" and any(not c["passed"] for c in record["checks"].values())


def _generic(reason: str) -> str:
    """A reason without what belongs to one model only: its class, its paths, the advice after the colon.

    Example:
        >>> _generic("residual branches inside a residual branch (a.b in a): Fixup is defined for one level")
        'residual branches inside a residual branch'
        >>> _generic("VGG has no residual branch: Fixup scales branches"), _generic("the model normalizes at a, b")
        ('has no residual branch', 'the model normalizes')
    """
    reason = re.sub(r"^\w+Error: ", "", reason)
    short = re.sub(r" \([^)]*\)| at .*|(?<=the copy of )\w+", "", reason.partition(":")[0])
    return re.sub(r"^\w+ (?=has no )", "", short)


def write_json(report: Record, path: Path) -> None:
    """The report, a line a model."""
    head = {key: value for key, value in report.items() if key != "rows"}
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in report["rows"])
    text = json.dumps(head, ensure_ascii=False, indent=1)
    files.write(path, f'{text[:-2]},\n "rows": [\n{rows}\n]}}\n')


def headline(report: Record) -> str:
    """How many models passed, by method."""
    counts = ", ".join(
        f"{method} {count.get('pass', 0)}/{report['measured']}" for method, count in report["counts"].items()
    )
    return f"{report['measured']} of {report['models']} models measured; passed: {counts}"


__all__ = [
    "BASE",
    "describe",
    "failed",
    "headline",
    "latest",
    "line",
    "published",
    "read",
    "summarize",
    "write_json",
]
