"""Adaptive gradient clipping: accuracy against learning rate with and without it at a large batch, and what it clips.

    python -m experiments.agc [--out runs/agc] [--jobs 2]

ResNet-8 on digits (1,294 training images of 8×8 pixels) at batch 256, 16 epochs of 5 steps, three paired seeds at
every rate: nothing is searched, every rate is shown. NF without clipping, with the recipe's λ for this batch (0.035)
and with DeepMind's 0.01; BatchNorm beside them. About 4 minutes on 2 cores. Interrupted, the same command goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from experiments.common import (
    COLORS,
    SEEDS,
    accuracies,
    arguments,
    band,
    compared,
    conclude,
    markdown,
    panels,
    percent,
    percent_axis,
    save,
    sweep,
)
from nfnets import files
from nfnets.train.compare import ExperimentConfig
from nfnets.train.loop.log import steps_and_evaluations

BATCH, EPOCHS = 256, 16
LRS = (0.1, 0.3, 1.0, 3.0)
ARMS: dict[str, dict[str, Any]] = {
    "bn": {"method": "bn"},
    "nf": {"method": "nf", "clipping": None},
    "nf-0.035": {"method": "nf", "clipping": 0.035},
    "nf-0.01": {"method": "nf", "clipping": 0.01},
}
LABELS = {"bn": "BatchNorm", "nf": "NF, no clipping", "nf-0.035": "NF, λ = 0.035", "nf-0.01": "NF, λ = 0.01"}
COMMAND = "python -m experiments.agc"


def experiment(lr: float, **fields: Any) -> ExperimentConfig:
    """All arms at one learning rate."""
    run = {"model": "bn_resnet8_cifar", "data": "digits", "epochs": EPOCHS, "threads": 1, "eval_every": 0}
    arms = [{"name": name, **arm} for name, arm in ARMS.items()]
    return ExperimentConfig.create(
        **{"run": run, "arms": arms, "lrs": [lr], "batch_sizes": [BATCH], "seeds": SEEDS} | fields
    )


def clipped(results: dict[str, Any], out: Path, arm: str) -> list[list[float]]:
    """The fraction of units that were clipped, step by step, a list for each seed."""
    runs = [r for r in results["runs"] if r["arm"] == arm]
    return [
        [s["clipped"] for s in steps_and_evaluations(out / r["folder"] / "log.jsonl")[0] if "clipped" in s]
        for r in runs
    ]


def table(found: dict[float, dict[str, Any]]) -> str:
    """Test accuracy by rate and arm, and λ's difference to no clipping, as Markdown."""
    body = []
    for name in ARMS:
        cells = []
        for results in found.values():
            values = accuracies(results, name, BATCH)
            lost = sum(r["status"] != "done" for r in results["runs"] if r["arm"] == name)
            cells.append(percent(values) + (f" ({lost} diverged)" if lost else ""))
        body.append([LABELS[name], *cells])
    for name in [name for name in ARMS if name.startswith("nf-")]:
        differences = [
            compared(accuracies(r, name, BATCH), accuracies(r, "nf", BATCH)) for r in found.values()
        ]
        body.append([f"{LABELS[name]} minus no clipping", *differences])
    return markdown(["test accuracy, %", *(f"lr {lr:g}" for lr in found)], body)


def draw(
    found: dict[float, dict[str, Any]], courses: dict[str, dict[float, list[list[float]]]], path: Path
) -> None:
    """Left accuracy against learning rate, right the clipped fraction over time."""
    figure, (left, right) = panels(2, width=9.6, height=3.7)
    for number, arm in enumerate(ARMS):
        band(left, list(found), [accuracies(r, arm, BATCH) for r in found.values()], number, LABELS[arm])
    left.set_xscale("log")
    left.set_xlabel("learning rate")
    left.set_ylim(0, 1)
    percent_axis(left, f"test accuracy, batch {BATCH}")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    styles = dict(zip(courses, ("-", "--"), strict=True))
    for arm, by_rate in courses.items():
        for number, seeds in enumerate(by_rate.values()):
            if shortest := min(map(len, seeds)):
                mean = np.mean([s[:shortest] for s in seeds], axis=0)
                right.plot(range(1, shortest + 1), mean, styles[arm], color=COLORS[number], lw=1.3)
    keys = [Line2D([], [], color=COLORS[number], label=f"lr {lr:g}") for number, lr in enumerate(found)]
    keys += [
        Line2D([], [], color="0.3", linestyle=style, label=LABELS[arm].removeprefix("NF, "))
        for arm, style in styles.items()
    ]
    right.legend(handles=keys, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    right.set_xlabel("step")
    percent_axis(right, "units clipped, mean of the seeds")
    right.set_ylim(0, 1)
    save(figure, path)


def main() -> None:
    options = arguments(__doc__, "runs/agc").parse_args()
    found, courses = {}, {name: {} for name in ARMS if name.startswith("nf-")}
    for lr in LRS:
        out = options.out / f"lr{lr:g}"
        found[lr] = sweep(experiment(lr), out, COMMAND, options.jobs)
        for name, by_rate in courses.items():
            by_rate[lr] = clipped(found[lr], out, name)
    files.write(options.out / "clipped.json", json.dumps(courses) + "\n")
    draw(found, courses, options.out / "agc.png")
    conclude(options.out, COMMAND, __doc__, table(found))


if __name__ == "__main__":
    main()
