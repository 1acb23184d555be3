"""Depth: 20, 56, 110 and 998 layers with Fixup, He's initialization, NF and BatchNorm (Fixup's figure 3 in small).

    python -m experiments.depth [--out runs/depth] [--jobs 2]

CIFAR ResNets on digits (1,294 training images of 8×8 pixels), batch 64: 2 epochs up to 110 layers, where every arm
searches five learning rates on validation data with a tuning seed and then runs with three paired seeds; 1 epoch (20
steps) at 998 layers, with the rate that won at 110. He's nets have no norm layer and lower rates to choose from.
About 20 core minutes. Interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import (
    SEEDS,
    TUNING_SEED,
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
from nfnets.train.compare import ExperimentConfig

ARMS: dict[str, dict[str, Any]] = {
    "bn": {"method": "bn"},
    "he": {"method": "bn", "lrs": [0.0001, 0.0003, 0.001, 0.003, 0.01], "clipping": None},
    "fixup": {"method": "fixup"},
    "nf": {"method": "nf"},
}
LABELS = {"bn": "BatchNorm", "he": "He, no norm", "fixup": "Fixup", "nf": "NF"}
DEPTHS, DEEPEST, BATCH = (20, 56, 110), 998, 64
LRS = (0.003, 0.01, 0.03, 0.1, 0.3)
COMMAND = "python -m experiments.depth"


def experiment(
    depth: int, epochs: int, rates: dict[str, float] | None = None, **fields: Any
) -> ExperimentConfig:
    """The comparison at one depth; with `rates` there is nothing to search."""
    run = {
        "data": "digits",
        "epochs": epochs,
        "threads": 1,
        "model": "experiments.nets:resnet",
        "eval_every": 0,
    }
    arms = []
    for name, arm in ARMS.items():
        options = {"depth": depth} | ({"weights": "he"} if name == "he" else {})
        lrs = {"lrs": [rates[name]]} if rates else {}
        arms.append({"name": name, "model_options": options, **arm, **lrs})
    return ExperimentConfig.create(
        **{
            "run": run,
            "arms": arms,
            "lrs": [0.1] if rates else LRS,
            "batch_sizes": [BATCH],
            "seeds": SEEDS,
            "tuning_seeds": [TUNING_SEED],
        }
        | fields
    )


def table(found: dict[int, dict[str, Any]]) -> str:
    """Test accuracy by depth and arm, and the paired difference to BatchNorm, as Markdown."""
    body = []
    for depth, results in found.items():
        rates = {c["arm"]: c["lr"] for c in results["chosen"]}
        for arm in ARMS:
            values = accuracies(results, arm, BATCH)
            lost = sum(r["status"] != "done" for r in results["runs"] if r["final"] and r["arm"] == arm)
            difference = compared(values, accuracies(results, "bn", BATCH)) if arm != "bn" else "–"
            body.append([depth, LABELS[arm], f"{rates[arm]:g}", percent(values), difference, lost or ""])
    return markdown(["layers", "arm", "lr", "test, %", "minus BN, points [95 %]", "diverged"], body)


def draw(found: dict[int, dict[str, Any]], path: Path) -> None:
    """Accuracy against depth."""
    figure, (axis,) = panels(width=5.6, height=3.7)
    depths: Sequence[int] = list(found)
    for number, arm in enumerate(ARMS):
        band(axis, depths, [accuracies(found[d], arm, BATCH) for d in depths], number, LABELS[arm])
    axis.set_xscale("log")
    axis.set_xticks(depths, [str(d) for d in depths])
    axis.minorticks_off()
    axis.set_xlabel(f"layers (2 epochs; {DEEPEST} layers: 20 steps)")
    percent_axis(axis, "test accuracy")
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def main() -> None:
    options = arguments(__doc__, "runs/depth").parse_args()
    found: dict[int, dict[str, Any]] = {}
    for depth in DEPTHS:
        found[depth] = sweep(experiment(depth, 2), options.out / f"d{depth}", COMMAND, options.jobs)
        conclude(options.out, COMMAND, __doc__, table(found))
    rates = {c["arm"]: c["lr"] for c in found[DEPTHS[-1]]["chosen"]}
    last = experiment(DEEPEST, 1, rates)
    found[DEEPEST] = sweep(last, options.out / f"d{DEEPEST}", COMMAND, options.jobs)
    draw(found, options.out / "depth.png")
    conclude(options.out, COMMAND, __doc__, table(found))


if __name__ == "__main__":
    main()
