"""From `results.json` to rows, verdicts and the terminal table, by pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nfnets.errors import UserError
from nfnets.plain import read_json
from nfnets.train.compare.experiment import FORMAT
from nfnets.train.compare.protocol import rate
from nfnets.train.compare.statistics import Interval, holm, holm_confidences, mean_interval, paired_difference


@dataclass(frozen=True)
class ArmRow:
    """One arm at one batch size."""

    arm: str
    batch_size: int
    lr: float
    tried: int
    """Learning rates that were searched."""
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    """Final-epoch test accuracy per seed; a diverged run counts as chance. Empty where every run diverged."""
    accuracy: Interval
    """NaN where every run diverged."""
    difference: Interval | None
    """To the baseline, over the seeds that both have; None for the baseline itself, and where there is nothing to
    compare. Its interval is as wide as Holm's procedure over all comparisons needs it: it leaves out zero exactly where
    `p` is below 0.05."""
    alone: Interval | None
    """The same difference with its 95 % interval by itself, as if it were the only comparison."""
    p: float
    """Of the difference, after Holm's correction over all comparisons."""
    diverged: int
    images_per_second: float | None
    peak_memory_mb: float | None
    train_seconds: float
    ece: float | None
    nothing: str = ""
    """Why there is no difference to the baseline."""


def read_results(path: Path) -> dict[str, Any]:
    """The content of a `results.json` (or of the directory that holds it).

    Raises:
        UserError: there is none, or it is something else.
    """
    file = path / "results.json" if path.is_dir() else path
    results = read_json(file, "what `nfnets compare --out` wrote")
    if results.get("format") != FORMAT:
        raise UserError(
            f"{file}: expected results of format {FORMAT}; write them again with `nfnets compare`"
        )
    if "tuning_seed" in results:  # of a search with one
        results["tuning_seeds"] = [results.pop("tuning_seed")]
    return results


def rows(results: dict[str, Any]) -> list[ArmRow]:
    """One row per arm and batch size, the baseline (the first arm) first within its batch size.

    A diverged run counts as chance (1 / number of classes): leaving it out would reward divergence. That is a penalty,
    and no measurement: an arm whose every run diverged has no accuracy and is not compared, nor is anything with it,
    and a seed of which both runs diverged does not count as a difference of zero.

    Args:
        results: The content of `results.json`.

    Returns:
        Rows of every arm that has at least one reported run.
    """
    experiment = results["experiment"]
    chance = 1.0 / results["data"]["num_classes"]
    finals = [run for run in results["runs"] if run["final"]]

    def accuracy(run: dict[str, Any]) -> float:
        return run["test_accuracy"] if run["status"] == "done" else chance

    def of(arm: str, batch_size: int) -> dict[int, dict[str, Any]]:
        found = {r["seed"]: r for r in finals if r["arm"] == arm and r["batch_size"] == batch_size}
        return {seed: found[seed] for seed in experiment["seeds"] if seed in found}

    table: list[ArmRow] = []
    pairs: list[tuple[list[float], list[float]]] = []
    for batch_size in experiment["batch_sizes"]:
        baseline = of(experiment["arms"][0]["name"], batch_size)
        for position, arm in enumerate(experiment["arms"]):
            runs = of(arm["name"], batch_size)
            if not runs:
                continue
            nothing = _nothing(runs, baseline, experiment["arms"][0]["name"]) if position else ""
            shared = [seed for seed in runs if position and seed in baseline and not nothing]
            shared = [seed for seed in shared if _ended(runs[seed]) or _ended(baseline[seed])]
            pairs.append(([accuracy(runs[s]) for s in shared], [accuracy(baseline[s]) for s in shared]))
            row = _row(arm["name"], batch_size, runs, len(experiment["lrs"]), accuracy, pairs[-1])
            table.append(replace(row, nothing=nothing))
    p_values = [row.alone.p if row.alone else math.nan for row in table]
    costs = {(cost["arm"], cost["batch_size"]): cost for cost in results.get("costs", [])}
    for position, row in enumerate(table):
        if cost := costs.get((row.arm, row.batch_size)):  # measured apart is better than measured in passing
            fields = {key: cost[key] for key in ("images_per_second", "peak_memory_mb")}
            table[position] = replace(row, **fields)
    corrected = zip(table, pairs, holm(p_values), holm_confidences(p_values), strict=True)
    return [
        replace(row, p=p, difference=row.alone and paired_difference(*pair, confidence))
        for row, pair, p, confidence in corrected
    ]


def _ended(run: dict[str, Any]) -> bool:
    return run["status"] == "done"


def _nothing(runs: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]], name: str) -> str:
    """Why an arm cannot be compared with the baseline, "" where it can."""
    lost, theirs_lost = (bool(each) and not any(map(_ended, each.values())) for each in (runs, baseline))
    if lost and theirs_lost:
        return "every run of both arms diverged"
    if lost or theirs_lost:
        return f"every run of {name} diverged" if theirs_lost else "every run of this arm diverged"
    shared = runs.keys() & baseline.keys()
    if not shared:
        return f"no seed shared with {name}"
    return "" if any(_ended(runs[s]) or _ended(baseline[s]) for s in shared) else "no pair of runs ended"


def _row(
    arm: str,
    batch_size: int,
    runs: dict[int, dict[str, Any]],
    tried: int,
    accuracy: Callable[[dict[str, Any]], float],
    pair: tuple[list[float], list[float]],
) -> ArmRow:
    done = [run for run in runs.values() if _ended(run)]
    accuracies = tuple(accuracy(run) for run in runs.values()) if done else ()
    alone = paired_difference(*pair) if pair[0] else None
    return ArmRow(
        arm=arm,
        batch_size=batch_size,
        lr=next(iter(runs.values()))["lr"],
        tried=tried,
        seeds=tuple(runs),
        accuracies=accuracies,
        accuracy=mean_interval(accuracies) if done else Interval(math.nan, math.nan, math.nan, 0, math.nan),
        difference=alone,
        alone=alone,
        p=math.nan,
        diverged=len(runs) - len(done),
        images_per_second=_median([r["images_per_second"] for r in done]),
        peak_memory_mb=max((m for r in done if (m := r["peak_memory_mb"]) is not None), default=None),
        train_seconds=math.fsum(run["train_seconds"] or 0.0 for run in runs.values()),
        ece=_mean([run["ece"] for run in done]),
    )


@dataclass(frozen=True)
class ArmVerdict:
    """What the numbers say about one arm at one batch size, and how sure they are."""

    arm: str
    batch_size: int
    kind: str
    """"above" | "not below" | "below" | "inconclusive" | "no comparison"."""
    text: str


def verdict(row: ArmRow, baseline: str, margin: float) -> ArmVerdict:
    """The verdict on one row in words.

    With d the mean paired difference to the baseline and [l, h] its 95 % interval, Holm-corrected:
    below if h < 0; above if l > 0; not below if the interval reaches zero and l ≥ −margin; inconclusive
    otherwise (it reaches zero, but also further below than a difference that matters). Where every run of an arm
    diverged there are no numbers to compare.

    Args:
        row: A row that is not the baseline's.
        baseline: The name of the arm that it is compared with.
        margin: Differences in accuracy below this one do not matter.

    Returns:
        A `ArmVerdict`; its text gives the difference and the interval in percentage points.
    """
    d = row.difference
    head = f"{row.arm} at batch size {row.batch_size}"
    if d is None:
        text = f"{head}: no comparison with {baseline}: {row.nothing}."
        return ArmVerdict(row.arm, row.batch_size, "no comparison", text)
    if math.isnan(d.low):
        kind, words = (
            "inconclusive",
            f"inconclusive: one seed ({points(d.mean)} points to {baseline}) has no interval",
        )
    elif d.high < 0:
        kind, words = "below", f"below {baseline} by {points(-d.mean, signed=False)} points {_span(d)}"
    elif d.low > 0:
        kind, words = "above", f"above {baseline} by {points(d.mean, signed=False)} points {_span(d)}"
    elif d.low >= -margin:
        kind, words = "not below", f"not below {baseline}: {points(d.mean)} points {_span(d)}"
    else:
        kind = "inconclusive"
        words = (
            f"inconclusive against {baseline}: {points(d.mean)} points, and the interval is "
            f"± {points(d.half, signed=False)} {_span(d)}; it reaches zero, but more seeds are needed "
            f"to rule out a loss of {points(margin, signed=False)}"
        )
    if kind in ("not below", "inconclusive") and row.alone is not None and row.alone.low * row.alone.high > 0:
        words += (
            f"; by itself, without Holm's correction over all comparisons, it would be {_span(row.alone)}"
        )
    if row.diverged:
        words += f"; {row.diverged} of {len(row.seeds)} runs diverged and count as chance"
    return ArmVerdict(row.arm, row.batch_size, kind, f"{head}: {words}.")


def verdicts(results: dict[str, Any], table: Sequence[ArmRow]) -> list[ArmVerdict]:
    """A verdict for every arm but the baseline, at every batch size."""
    experiment = results["experiment"]
    baseline = experiment["arms"][0]["name"]
    return [verdict(row, baseline, experiment["margin"]) for row in table if row.arm != baseline]


@dataclass(frozen=True)
class Summary:
    """What a comparison says, worked out once for the page and the terminal."""

    results: dict[str, Any]
    """The content of `results.json`."""
    rows: list[ArmRow]
    verdicts: list[ArmVerdict]

    @property
    def says_nothing(self) -> bool:
        """Whether a finished comparison compared nothing: wherever there was one, every run of an arm diverged.

        One arm alone says something as soon as one of its runs ended.
        """
        if not self.results["complete"]:
            return False
        if self.verdicts:
            return all(verdict.kind == "no comparison" for verdict in self.verdicts)
        return not any(row.accuracies for row in self.rows)


def summarize(results: dict[str, Any]) -> Summary:
    """The summary of a `results.json`."""
    table = rows(results)
    return Summary(results, table, verdicts(results, table))


HEADINGS = (
    "arm",
    "batch",
    "lr",
    "test accuracy",
    "difference",
    "p (Holm)",
    "diverged",
    "images/s",
    "peak memory",
)
# What fits a terminal of 80 columns, by heading.
NARROW = {
    "arm": "arm",
    "batch": "batch",
    "lr": "lr",
    "test accuracy": "test acc., %",
    "difference": "difference [95 %]",
    "diverged": "div.",
    "images/s": "img/s",
    "peak memory": "MB",
}


def cells(row: ArmRow) -> tuple[str, ...]:
    """One row as text under `HEADINGS`: accuracy in %, difference in points, both with 95 % intervals."""
    d = row.difference
    half = "" if math.isnan(row.accuracy.half) else f" ± {100 * row.accuracy.half:.2f}"
    if d is None:
        difference = "–"
    else:
        difference = points(d.mean) + ("" if math.isnan(d.low) else f" {_span(d)}")
    return (
        row.arm,
        str(row.batch_size),
        rate(row.lr),
        f"{100 * row.accuracy.mean:.2f}{half} %" if row.accuracies else "–",
        difference,
        "–" if math.isnan(row.p) else "< 0.001" if row.p < 0.001 else f"{row.p:.3f}",
        f"{row.diverged}/{len(row.seeds)}",
        "–" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
        "–" if row.peak_memory_mb is None else f"{row.peak_memory_mb:,.0f} MB",
    )


def seeds_in_words(seeds: Sequence[int]) -> str:
    """The seeds of a search, in a sentence.

    Example:
        >>> seeds_in_words([100]), seeds_in_words([100, 101, 102])
        ('seed 100', 'the mean over seeds 100, 101, 102')
    """
    words = ", ".join(str(seed) for seed in seeds)
    return f"seed {words}" if len(seeds) == 1 else f"the mean over seeds {words}"


def caption(summary: Summary) -> str:
    """What the table's numbers are, in one or two sentences."""
    results = summary.results
    experiment, data = results["experiment"], results["data"]
    baseline = experiment["arms"][0]["name"]
    n = len(experiment["seeds"])
    searched = len(experiment["lrs"])
    search = (
        f"{searched} learning rates searched per arm on the validation split "
        f"with {seeds_in_words(results['tuning_seeds'])}"
        if searched > 1
        else "one learning rate per arm, not searched"
    )
    jobs = results["jobs"]
    compared = sum(not math.isnan(row.p) for row in summary.rows)
    corrected = f", its interval Holm-corrected over {compared} comparisons" if compared > 1 else ""
    together = f" Speed with {jobs} runs side by side." if jobs > 1 else ""
    if results.get("costs"):
        together = " Speed and memory of training steps alone, without evaluation and what happens once."
    return (
        f"{data['name']}: final epoch on the test split ({data['test']:,} images), mean ± 95 % interval "
        f"over {n} seed{'s' if n > 1 else ''}; difference to {baseline} in percentage points, "
        f"paired by seed{corrected}; {search}. A diverged run counts as chance; "
        f"an arm that only diverged has no number.{together}"
    )


def terminal(summary: Summary) -> Group:
    """The comparison for a terminal: the table and the verdicts."""
    table = Table(box=box.SIMPLE_HEAD, caption=Text(caption(summary)), caption_justify="left", pad_edge=False)
    for heading in NARROW.values():
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=heading != "arm")
    for above, row in zip([None, *summary.rows], summary.rows, strict=False):
        if above is not None and above.batch_size != row.batch_size:
            table.add_section()
        texts: dict[str, str] = dict(zip(HEADINGS, cells(row), strict=True))
        cut = (texts[heading].removesuffix(" %").removesuffix(" MB") for heading in NARROW)
        table.add_row(*map(Text, cut))  # not str: a name in brackets is not markup
    colors = {"above": "green", "not below": "green", "below": "red", "inconclusive": "yellow"}
    colors["no comparison"] = "yellow"
    words = [Text(v.text, style=colors[v.kind]) for v in summary.verdicts]
    if not summary.results["complete"]:
        words.append(Text("The sweep is not finished: the same command goes on with it.", style="yellow"))
    return Group(table, Text(), *words)


COST_HEADINGS = ("arm", "batch", "images/s", "step, ms", "middle half of the steps", "first step", "memory")


def cost_cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """What a training step costs, as text under `COST_HEADINGS`; empty where it was not measured."""
    found = []
    for cost in results.get("costs", []):
        low, median, high = (1000 * q for q in np.quantile(cost["step_seconds"], (0.25, 0.5, 0.75)))
        found.append(
            (
                cost["arm"],
                str(cost["batch_size"]),
                f"{cost['images_per_second']:,.0f}",
                f"{median:.3g}",
                f"{low:.3g} – {high:.3g}",
                f"{cost['first_step_seconds']:.2g} s",
                f"{cost['peak_memory_mb']:,.0f} MB",
            )
        )
    return found


def points(value: float, signed: bool = True) -> str:
    """A difference of accuracies in percentage points.

    Example:
        >>> points(0.0123), points(-0.002), points(0.01, signed=False)
        ('+1.23', '−0.20', '1.00')
    """
    text = f"{100 * value:+.2f}" if signed else f"{100 * value:.2f}"
    return text.replace("-", "−")


def _span(d: Interval) -> str:
    return f"[{points(d.low)}, {points(d.high)}]"


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    there = _present(values)
    return math.fsum(there) / len(there) if there else None


def _median(values: Sequence[float | None]) -> float | None:
    there = sorted(_present(values))
    middle = len(there) // 2
    if not there:
        return None
    return there[middle] if len(there) % 2 else (there[middle - 1] + there[middle]) / 2
