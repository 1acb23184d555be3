"""The report as one self-contained HTML file, and its counts as tables in a Markdown page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nfnets import files

TEMPLATE = Path(__file__).with_name("template.html")
_MARK = "/*REPORT*/null"


START, END = "<!-- written by the run: start -->", "<!-- written by the run: end -->"


def write_table(report: dict[str, Any], path: Path) -> None:
    """Put the counts by library, and what failed, between the two marks of a Markdown page."""
    text = path.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    files.write(path, f"{before}{START}\n\n{markdown(report)}\n{END}{after}")


def markdown(report: dict[str, Any]) -> str:
    """A row a library, a row each reason for refusals, a row each cell that failed."""
    methods = report["methods"]
    head = ["library", "version", "nets"]
    head += [f"{method} {what}" for method in methods for what in ("converted", "refused", "failed")]
    lines = [_row(head), _row(["---"] * len(head))]
    for source, counts in [*report["by_source"].items(), ("**all**", report["counts"])]:
        run = max(sum(_split(counts[method])) for method in methods)
        cells = [n for method in methods for n in _split(counts[method])]
        lines.append(_row([source, report["versions"].get(source, ""), run, *cells]))
    lines += ["", "Refused:", "", _row(["method", "nets", "reason"]), _row(["---"] * 3)]
    lines += [_row([r["method"], r["models"], r["reason"]]) for r in report["refusals"]] or [
        _row(["", 0, "nothing"])
    ]
    lines += ["", "Failed:", "", _row(["net", "method", "what"]), _row(["---"] * 3)]
    failed = [
        _row([f"{row['source']}/{row['name']}", method, _what(cell)])
        for row in report["rows"]
        for method, cell in row["methods"].items()
        if cell["verdict"] not in ("pass", "refused")
    ]
    return "\n".join([*lines, *(failed or [_row(["", "", "nothing"])])]) + "\n"


def _split(counts: dict[str, int]) -> tuple[int, int, int]:
    """Converted with every check passed, refused, failed."""
    passed, refused = counts.get("pass", 0), counts.get("refused", 0)
    return passed, refused, sum(counts.values()) - passed - refused - counts.get("pending", 0)


def _what(cell: dict[str, Any]) -> str:
    found = [f"{name}: {detail}" for name, detail in cell["failed"].items()]
    return " · ".join([cell["reason"], *found] if cell["reason"] else found)[:160]


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write the page; it asks for nothing from anywhere."""
    text = json.dumps(report, ensure_ascii=False, separators=(",", ":"))
    safe = text.replace("</", "<\\/").replace("<!--", "<\\!--")
    files.write(path, TEMPLATE.read_text().replace(_MARK, safe))
