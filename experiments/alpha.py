"""α: the scale of residual branches against depth, on validation images. The default of `nf` comes from here.

    python -m experiments.alpha [--out runs/alpha] [--jobs 2]

CIFAR ResNets on digits (1,294 training images of 8×8 pixels), batch 64, 2 epochs, λ = 0.0707, four seeds; 998 layers:
1 epoch, two seeds. ResNet-14 on 4,500 images of Fashion-MNIST, 3 epochs, three seeds. The test split is never read.
About 12 minutes on 2 cores. Interrupted, the same command goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.common import (
    Cell,
    arguments,
    band,
    conclude,
    grouped,
    markdown,
    panels,
    percent,
    percent_axis,
    save,
    validate,
)
from nfnets.train import RunConfig

COMMAND = "python -m experiments.alpha"
COMMON = {"method": "nf", "clipping": 0.0707, "batch_size": 64, "threads": 1, "eval_every": 0}
DIGITS = {"data": "digits", "epochs": 2, "model": "experiments.nets:resnet"}
FASHION = {"data": "fashion-mnist", "train_limit": 5000, "epochs": 3, "model": "bn_resnet14_cifar"}
SEEDS = (100, 101, 102, 103)
# Layers, branches, the run, candidates for α, rates, seeds. √(2/L) comes first.
GRID: tuple[tuple[int, int, dict[str, Any], tuple[float, ...], tuple[float, ...], tuple[int, ...]], ...] = (
    (14, 6, FASHION, (0.577, 0.408, 0.25), (0.1, 0.2), SEEDS[:3]),
    (20, 9, DIGITS, (0.47, 0.333, 0.236), (0.1, 0.3), SEEDS),
    (56, 27, DIGITS, (0.272, 0.192, 0.136), (0.03, 0.1), SEEDS),
    (110, 54, DIGITS, (0.192, 0.136, 0.096, 0.3), (0.03, 0.1), SEEDS),
    (998, 498, DIGITS | {"epochs": 1}, (0.045, 0.012), (0.1,), SEEDS[:2]),
)


def grid(rows: Iterable[tuple[Any, ...]], out: Path) -> list[Cell]:
    """A run for each depth, α, rate and seed."""
    return [
        (
            {"layers": layers, "branches": branches, "alpha": alpha, "lr": lr, "seed": seed},
            _config(layers, fields, alpha, lr, seed),
            out / f"{layers}-alpha{alpha}-lr{lr}-s{seed}",
        )
        for layers, branches, fields, alphas, lrs, seeds in rows
        for alpha in alphas
        for lr in lrs
        for seed in seeds
    ]


def _config(layers: int, fields: dict[str, Any], alpha: float, lr: float, seed: int) -> RunConfig:
    depth = {"model_options": {"depth": layers}} if fields["model"].startswith("experiments") else {}
    own = {"method_options": {"alpha": alpha}, "lr": lr, "seed": seed}
    return RunConfig.create(**(COMMON | fields), **depth, **own)


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each depth, α and rate, over its seeds."""
    cells = grouped(runs, "layers", "branches", "alpha", "lr")
    body = [[*cell, percent(values), len(values)] for cell, values in cells.items()]
    return markdown(["layers", "L", "α", "lr", "validation, %", "seeds"], body)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Validation accuracy against α, a panel for each depth, a line for each rate; dotted: the rule's α."""
    depths = grouped(runs, "layers", "branches")
    figure, axes = panels(len(depths), width=2.6 * len(depths) + 0.8, height=3.3, sharey=True)
    for axis, (layers, branches) in zip(axes, depths, strict=True):
        here = [run for run in runs if run["layers"] == layers]
        for number, lr in enumerate(sorted(grouped(here, "lr"))):
            found = grouped([run for run in here if run["lr"] == lr], "alpha")
            places = sorted(found)
            band(axis, places, [found[alpha] for alpha in places], number, f"lr {lr:g}")
        axis.axvline(min(math.sqrt(2 / branches), 6 / branches), color="0.4", linestyle=":", linewidth=1)
        axis.set_title(f"{layers} layers", fontsize=11)
        axis.set_xlabel("α")
        axis.legend(frameon=False, fontsize=8)
    percent_axis(axes[0], "validation accuracy")
    save(figure, path)


def main() -> None:
    options = arguments(__doc__, "runs/alpha").parse_args()
    runs = validate(grid(GRID, options.out), options.out, COMMAND, options.jobs)
    draw(runs, options.out / "alpha.png")
    conclude(options.out, COMMAND, __doc__, table(runs))


if __name__ == "__main__":
    main()
