"""The files that a comparison leaves beside its numbers: PNGs and the page."""

from __future__ import annotations

from pathlib import Path

from nfnets import files
from nfnets.errors import UserError
from nfnets.train.compare.page.document import Signal, data_uri, page
from nfnets.train.compare.page.figures import curves, save_pngs
from nfnets.train.compare.summary import Summary, read_results, summarize


def write_report(out: Path, found: Summary | None = None) -> Path:
    """Write `index.html`, `curves.png`, `accuracy.png` (and the signal reports' PNGs) from `results.json` and the logs.

    A pure function of what the experiment left in `out`: it can be repeated at any time.

    Args:
        out: The experiment's directory.
        found: Its summary, where somebody has it.

    Returns:
        The path of the page.

    Raises:
        UserError: there are no results, none of them reported yet, or the directory cannot be written.
    """
    found = summarize(read_results(out)) if found is None else found
    if not any(run["final"] for run in found.results["runs"]):
        raise UserError(f"{out}: no reported run is finished yet; go on with `nfnets compare --resume`")
    courses = curves(found.results, out)
    save_pngs(found, out, courses)
    signals = {
        title: signal
        for title, name in SIGNALS.items()
        if (signal := _signal(out, f"{name}.json", f"{name}.png")) is not None
    }
    return files.write(out / "index.html", page(found, out, courses, signals).encode(errors="replace"))


SIGNALS = {"at initialization": "signal", "after training": "signal-after"}


def _signal(out: Path, source: str, png: str) -> Signal | None:
    if not (out / source).exists():
        return None
    from nfnets.signal import SignalReport

    report = SignalReport.from_json(out / source)
    files.write(out / png, lambda path: report.plot().savefig(path, dpi=150))
    whole = (out / source).with_suffix(".html").name
    return Signal(
        report.panels_html(include_plotlyjs=False),
        data_uri(out / png),
        whole if (out / whole).is_file() else "",
    )
