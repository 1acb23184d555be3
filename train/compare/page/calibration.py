"""Calibration of the arms: reliability diagrams and expected calibration error over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nfnets.train.compare.statistics import Interval, mean_interval, paired_difference


@dataclass(frozen=True)
class Bin:
    """The test samples of all seeds whose confidence fell into one interval."""

    count: int
    confidence: float
    accuracy: float


def reliability(results: dict[str, Any]) -> dict[tuple[str, int], list[Bin]]:
    """The reliability diagram of every arm and batch size, over the test samples of all its seeds.

    Args:
        results: The content of `results.json`.

    Returns:
        The bins that hold samples, in the order of confidence, by (arm, batch size).

    Reference:
        Guo et al., arXiv 1706.04599, figure 1.
    """
    found: dict[tuple[str, int], list[Bin]] = {}
    for run in results["runs"]:
        if run["final"] and run.get("reliability"):
            place = run["arm"], run["batch_size"]
            mine = [Bin(int(n), confidence, accuracy) for n, confidence, accuracy in run["reliability"]]
            others = found.get(place)
            found[place] = mine if others is None else list(map(_pooled, others, mine))
    return {place: [entry for entry in bins if entry.count] for place, bins in found.items()}


def _pooled(a: Bin, b: Bin) -> Bin:
    n = a.count + b.count
    if not n:
        return a
    return Bin(
        n,
        (a.count * a.confidence + b.count * b.confidence) / n,
        (a.count * a.accuracy + b.count * b.accuracy) / n,
    )


HEADINGS = ("arm", "batch", "ECE", "difference", "mean confidence", "accuracy")


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """ECE of every arm and batch size with its 95 % interval, as text under `HEADINGS`; paired with the baseline."""
    found = []
    experiment = results["experiment"]
    diagrams = reliability(results)
    for batch_size in experiment["batch_sizes"]:
        baseline = _errors(results, experiment["arms"][0]["name"], batch_size)
        for position, arm in enumerate(experiment["arms"]):
            mine = _errors(results, arm["name"], batch_size)
            if not mine:
                continue
            shared = [seed for seed in mine if position and seed in baseline]
            difference = None
            if shared:
                difference = paired_difference([mine[s] for s in shared], [baseline[s] for s in shared])
            bins = diagrams.get((arm["name"], batch_size), [])
            total = sum(entry.count for entry in bins)
            means = ("–", "–")
            if total:
                confidence = math.fsum(entry.count * entry.confidence for entry in bins) / total
                accuracy = math.fsum(entry.count * entry.accuracy for entry in bins) / total
                means = f"{100 * confidence:.2f} %", f"{100 * accuracy:.2f} %"
            error = mean_interval(list(mine.values()))
            found.append((arm["name"], str(batch_size), _ece(error), _signed(difference), *means))
    return found


def _errors(results: dict[str, Any], arm: str, batch_size: int) -> dict[int, float]:
    return {
        run["seed"]: run["ece"]
        for run in results["runs"]
        if run["final"]
        and run["arm"] == arm
        and run["batch_size"] == batch_size
        and run.get("ece") is not None
    }


def _ece(error: Interval) -> str:
    half = "" if math.isnan(error.half) else f" ± {error.half:.4f}"
    return f"{error.mean:.4f}{half}"


def _signed(difference: Interval | None) -> str:
    if difference is None:
        return "–"
    span = "" if math.isnan(difference.low) else f" [{difference.low:+.4f}, {difference.high:+.4f}]"
    return f"{difference.mean:+.4f}{span}".replace("-", "−")
