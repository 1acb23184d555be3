"""α: the scale of residual branches against depth, on validation images. The default of `nf` comes from here.

    python -m experiments.alpha [--out runs/alpha] [--jobs 2]

CIFAR ResNets on digits (1,294 training images of 8×8 pixels), batch 64, 2 epochs, λ = 0.0707, four seeds; 998 layers:
1 epoch, two seeds. ResNet-14 on 4,500 images of Fashion-MNIST, 3 epochs, three seeds. The test split is never read.
About 12 minutes on 2 cores. Interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.common import arguments, conclude, markdown, percent, validate
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


Cell = tuple[int, int, float, float]
"""Layers, branches, α, learning rate."""


def grid(rows: Iterable[tuple[Any, ...]], out: Path) -> dict[tuple[Cell, int], tuple[RunConfig, Path]]:
    """By cell and seed: the run and its folder."""
    return {
        ((layers, branches, alpha, lr), seed): (
            _config(layers, fields, alpha, lr, seed),
            out / f"{layers}-alpha{alpha}-lr{lr}-s{seed}",
        )
        for layers, branches, fields, alphas, lrs, seeds in rows
        for alpha in alphas
        for lr in lrs
        for seed in seeds
    }


def _config(layers: int, fields: dict[str, Any], alpha: float, lr: float, seed: int) -> RunConfig:
    depth = {"model_options": {"depth": layers}} if fields["model"].startswith("experiments") else {}
    own = {"method_options": {"alpha": alpha}, "lr": lr, "seed": seed}
    return RunConfig.create(**(COMMON | fields), **depth, **own)


def table(found: Iterable[tuple[tuple[Cell, int], float]]) -> str:
    """A row for each cell, over its seeds."""
    cells: dict[Cell, list[float]] = {}
    for (cell, seed), accuracy in found:
        cells.setdefault(cell, []).append(accuracy)
        print(*cell, seed, f"{accuracy:.3f}", flush=True)
    body = [[*cell, percent(values), len(values)] for cell, values in cells.items()]
    return markdown(["layers", "L", "α", "lr", "validation, %", "seeds"], body)


def main() -> None:
    options = arguments(__doc__, "runs/alpha").parse_args()
    conclude(options.out, COMMAND, table(validate(grid(GRID, options.out), options.jobs)))


if __name__ == "__main__":
    main()
