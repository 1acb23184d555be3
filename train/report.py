"""The files that a comparison leaves beside its numbers: PNGs and the page."""

from __future__ import annotations

from pathlib import Path

from nfnets.errors import UserError
from nfnets.train.comparison import read_results
from nfnets.train.comparison_figures import curves, save_pngs
from nfnets.train.comparison_page import page


def write_report(out: Path) -> Path:
    """Write `index.html`, `curves.png`, `accuracy.png` (and `signal.png`) from `results.json` and the logs.

    A pure function of what the experiment left in `out`: it can be repeated at any time.

    Args:
        out: The experiment's directory.

    Returns:
        The path of the page.

    Raises:
        UserError: there are no results, none of them reported yet, or the directory cannot be written.
    """
    results = read_results(out)
    if not any(run["final"] for run in results["runs"]):
        raise UserError(f"{out}: no reported run is finished yet; go on with `nfnets compare --resume`")
    try:
        save_pngs(results, out, curves(results, out))
        (out / "index.html").write_text(page(results, out, _signal_panels(out)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; make it writable") from None
    return out / "index.html"


def _signal_panels(out: Path) -> str:
    if not (out / "signal.json").exists():
        return ""
    from nfnets.signal import SignalReport

    report = SignalReport.from_json(out / "signal.json")
    report.plot().savefig(out / "signal.png", dpi=150)
    return report.panels_html(include_plotlyjs=False)
