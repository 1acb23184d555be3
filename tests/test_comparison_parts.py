"""Time to accuracy and calibration by their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nfnets.train.compare.page.calibration import reliability, rows
from nfnets.train.compare.page.times import censored_median, times
from nfnets.train.compare.progress import Pace
from nfnets.train.loop.evaluate import metrics


@given(st.lists(st.one_of(st.none(), st.floats(0.1, 100)), min_size=1, max_size=9))
def test_the_censored_median_is_the_median_with_never_at_infinity(values: list[float | None]) -> None:
    expected = float(np.median([math.inf if v is None else v for v in values]))
    found = censored_median(values)
    assert (math.inf if found is None else found) == pytest.approx(expected)


def results_of(runs: list[dict[str, Any]], **experiment: Any) -> dict[str, Any]:
    shared = {"final": True, "status": "done", "batch_size": 8, "config": {"epochs": 4}, "total_steps": 40}
    return {
        "experiment": {
            "arms": [{"name": "bn"}, {"name": "nf"}],
            "batch_sizes": [8],
            "margin": 0.01,
            "target": None,
        }
        | experiment,
        "runs": [shared | run for run in runs],
    }


def test_time_to_accuracy_counts_the_runs_that_never_came(tmp_path: Path) -> None:
    courses = {
        ("bn", 0): [0.5, 0.7, 0.8, 0.9],
        ("bn", 1): [0.6, 0.88, 0.85, 0.86],
        ("nf", 0): [0.86, 0.9, 0.91, 0.92],
        ("nf", 1): [0.1, None, 0.3, 0.869],
    }
    runs = []
    for (arm, seed), course in courses.items():
        folder = tmp_path / f"{arm}{seed}"
        folder.mkdir()
        lines = [{"step": step, "loss": 1.0} for step in range(1, 41)]
        lines += [
            {"step": 10 * (e + 1), "split": "val", "loss": 1.0, "accuracy": a} for e, a in enumerate(course)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(
            {
                "arm": arm,
                "seed": seed,
                "folder": folder.name,
                "val_accuracy": course[-1],
                "images_per_second": 20.0 if arm == "bn" else 10.0,
            }
        )
    bn, nf = times(results_of(runs), tmp_path)
    assert bn.target == nf.target == pytest.approx(0.88 - 0.01)
    assert (bn.epochs, nf.epochs) == ((4.0, 2.0), (2.0, None))
    # Step 40 of 8 images at 20 images a second; 20 at 10 images a second.
    assert bn.seconds == (pytest.approx(16.0), pytest.approx(8.0))
    assert nf.seconds == (pytest.approx(16.0), None)
    assert (nf.reached, censored_median(nf.epochs)) == (1, None)
    declared = times(results_of(runs, target=0.86), tmp_path)
    assert [entry.epochs for entry in declared] == [(4.0, 2.0), (1.0, 4.0)]
    # A baseline that never ended sets no target.
    lost = [run | {"status": "diverged"} if run["arm"] == "bn" else run for run in runs]
    assert times(results_of(lost), tmp_path) == []


def test_pooled_bins_are_the_bins_of_all_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    runs, samples = [], []
    for seed in range(3):
        confidence = torch.rand(200, generator=generator)
        correct = torch.rand(200, generator=generator) < confidence
        samples.append((confidence, correct))
        measured = metrics(torch.ones(200), correct, confidence)
        runs.append(
            {
                "arm": "bn",
                "seed": seed,
                "ece": measured.ece,
                "reliability": [list(entry) for entry in measured.bins],
            }
        )
    (bins,) = reliability(results_of(runs)).values()
    confidence = torch.cat([c for c, _ in samples])
    correct = torch.cat([c for _, c in samples])
    whole = metrics(torch.ones(600), correct, confidence)
    expected = [entry for entry in whole.bins if entry[0]]
    assert [b.count for b in bins] == [n for n, _, _ in expected]
    assert [b.confidence for b in bins] == pytest.approx([c for _, c, _ in expected])
    assert [b.accuracy for b in bins] == pytest.approx([a for _, _, a in expected])
    ((_, _, ece, difference, mean_confidence, accuracy),) = rows(results_of(runs))
    assert ece.startswith(f"{np.mean([run['ece'] for run in runs]):.4f} ± ")
    assert difference == "–"
    assert mean_confidence == f"{100 * float(confidence.mean()):.2f} %"
    assert accuracy == f"{100 * float(correct.float().mean()):.2f} %"


def test_results_without_bins_have_no_diagram() -> None:
    assert reliability(results_of([{"arm": "bn", "seed": 0, "ece": 0.1}])) == {}
    assert rows(results_of([{"arm": "bn", "seed": 0, "ece": None}])) == []


def test_the_time_left_follows_every_kind_of_step_and_all_processes() -> None:
    pace = Pace({("bn", 64): 200, ("nf", 64): 100})
    assert pace.left(5.0) is None
    pace.seconds = {("bn", 64): 0.1, ("nf", 64): 0.4}
    pace.before["bn", 64] = 100  # found finished: not this sweep's speed
    assert pace.left(0.0) == pytest.approx(100 * 0.1 + 100 * 0.4)
    pace.done["bn", 64], pace.done["nf", 64] = 50, 50
    # 25 s of work took 12.5 s: two processes were at it, and 25 s of work are left.
    assert pace.left(12.5) == pytest.approx(12.5)
