"""Accuracy against batch size: BatchNorm, its small-batch repairs, and what does without it, on Fashion-MNIST.

    python -m experiments.batch_size [--data digits] [--out runs/batch-size] [--jobs 2]

ResNet-8; 1,600 training and 400 validation images of Fashion-MNIST, or digits (1,294 training images of 8×8 pixels).
2 epochs at every batch size, more at 128 and 512, so that there are about 50 steps or more. Every arm searches four
rates on the validation images with a tuning seed at every batch size (they follow the square root of the batch size),
then runs with three paired seeds. Every arm trains with its default recipe; NF and Fixup also without clipping. About
120 core minutes, 25 on digits.

Not run twice: ghost batches of 8 are BatchNorm at batch 8 and below. Interrupted, the same command goes on; finished,
it prints the table.
"""

from __future__ import annotations

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
    percent_axis,
    save,
    sweep,
)
from nfnets.train.compare import ExperimentConfig
from nfnets.train.compare.statistics import mean_interval

RUN: dict[str, Any] = {"model": "bn_resnet8_cifar", "threads": 1, "eval_every": 0}
EPOCHS = {128: 4, 512: 16}
"""Where 2 would be too few steps to tell anything."""
DATA: dict[str, dict[str, Any]] = {
    "digits": {"data": "digits"},
    "fashion-mnist": {"data": "fashion-mnist", "train_limit": 2000, "validation_fraction": 0.2},
}
# What stands in figures and tables, the arm at large batches and what it equals at batch 8 and below.
ARMS: dict[str, tuple[dict[str, Any], str | None]] = {
    "bn": ({"method": "bn"}, None),
    "ghost_bn": ({"method": "ghost_bn", "method_options": {"size": 8}}, "bn"),
    "gn": ({"method": "gn"}, None),
    "ws_gn": ({"method": "ws_gn"}, None),
    "fixup": ({"method": "fixup", "clipping": None}, None),
    "fixup+agc": ({"method": "fixup"}, None),
    "skipinit": ({"method": "skipinit"}, None),
    "fixed_variance": ({"method": "fixed_variance"}, None),
    "nf": ({"method": "nf", "clipping": None}, None),
    "nf+agc": ({"method": "nf"}, None),
}
LABELS = {
    "bn": "BatchNorm",
    "ghost_bn": "GhostBN (8)",
    "gn": "GroupNorm",
    "ws_gn": "WS + GroupNorm",
    "fixup": "Fixup",
    "fixup+agc": "Fixup + AGC",
    "skipinit": "SkipInit",
    "fixed_variance": "fixed_variance",
    "nf": "NF",
    "nf+agc": "NF + AGC",
}
SMALL = 8
# In this order: what tells most first.
SIZES = (4, 32, 2, 8, 128, 512)
# At batch 2; 0.1 times the square root of the batch size over 64 is what the other experiments search around.
LRS = (0.006, 0.018, 0.054, 0.162)
COMMAND = "python -m experiments.batch_size"


def experiment(size: int, data: str = "fashion-mnist", **fields: Any) -> ExperimentConfig:
    """The comparison at one batch size."""
    return ExperimentConfig.create(
        **{
            "run": RUN | DATA[data] | {"epochs": EPOCHS.get(size, 2)},
            "arms": [{"name": n, **arm} for n, (arm, same) in ARMS.items() if not (size <= SMALL and same)],
            "lrs": [float(f"{lr * (size / 2) ** 0.5:.3g}") for lr in LRS],
            "batch_sizes": [size],
            "seeds": SEEDS,
            "tuning_seeds": [TUNING_SEED],
        }
        | fields
    )


def found(results: list[dict[str, Any]]) -> dict[tuple[str, int], list[float]]:
    """Test accuracies over seeds by arm and batch size, in the order of `ARMS` and of the sizes."""
    every: dict[tuple[str, int], list[float]] = {}
    for size in sorted(b for r in results for b in r["experiment"]["batch_sizes"]):
        there = next(r for r in results if size in r["experiment"]["batch_sizes"])
        names = {arm["name"] for arm in there["experiment"]["arms"]}
        for name, (_, same) in ARMS.items():
            stands_in = name if name in names or size > SMALL else str(same)
            if values := accuracies(there, stands_in, size):
                every[name, size] = values
    return every


def table(every: dict[tuple[str, int], list[float]]) -> str:
    """Mean accuracy by arm and batch size, then the paired differences to BatchNorm, as Markdown."""
    sizes = sorted({size for _, size in every})
    names = [name for name in ARMS if any((name, size) in every for size in sizes)]

    def line(name: str, cell: Any) -> list[str]:
        return [LABELS[name], *(cell(every[name, s], every["bn", s]) for s in sizes)]

    means = [line(name, lambda a, _: f"{100 * mean_interval(a).mean:.1f}") for name in names]
    head = [f"batch {size}" for size in sizes]
    return "\n\n".join(
        [
            markdown(["test accuracy, %", *head], means),
            markdown(
                ["minus BatchNorm, points [95 %]", *head], [line(n, compared) for n in names if n != "bn"]
            ),
        ]
    )


def draw(every: dict[tuple[str, int], list[float]], path: Path) -> None:
    """The papers' figure: accuracy against batch size, a line for each arm; normalized left, norm-free right."""
    sizes = sorted({size for _, size in every})
    normalized = [n for n in ARMS if n in ("bn", "ghost_bn", "gn", "ws_gn")]
    free = ["bn", *(n for n in ARMS if n not in normalized)]
    figure, axes = panels(2, width=9.2, height=3.9, sharey=True)
    for axis, names, title in zip(
        axes, (normalized, free), ("normalized", "without a norm layer"), strict=True
    ):
        for number, name in enumerate(names):
            if there := [size for size in sizes if (name, size) in every]:
                band(axis, there, [every[name, size] for size in there], number, LABELS[name])
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("batch size")
        axis.set_title(title, fontsize=11)
        axis.legend(frameon=False, fontsize=8)
    percent_axis(axes[0], "test accuracy")
    figure.supxlabel("lines: mean over the seeds; bands: lowest to highest seed", fontsize=8, color="0.4")
    save(figure, path)


def main() -> None:
    parser = arguments(__doc__, "runs/batch-size")
    parser.add_argument("--data", choices=sorted(DATA), default="fashion-mnist")
    options = parser.parse_args()
    results, out = [], options.out / options.data
    for size in SIZES:
        results.append(sweep(experiment(size, options.data), out / f"b{size}", COMMAND, options.jobs))
        every = found(results)
        draw(every, out / "batch_size.png")
        conclude(out, f"{COMMAND} --data {options.data}", __doc__, table(every))


if __name__ == "__main__":
    main()
