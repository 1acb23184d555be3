"""α: the scale of residual branches against depth, on validation images. The default of `nf` comes from here.

    python -m experiments.alpha [--out runs/alpha] [--jobs 2]

CIFAR ResNets on digits (1,294 training images of 8×8 pixels), batch 64, 2 epochs, λ = 0.0707, four seeds; 998 layers:
1 epoch, two seeds. ResNet-14 on 4,500 images of Fashion-MNIST, 3 epochs, three seeds. The test split is never read.
About 12 minutes on 2 cores. Interrupted, the same command goes on.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from experiments.common import arguments, conclude, markdown, percent
from nfnets.train import RunConfig, run

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


def runs(
    layers: int, fields: dict[str, Any], alpha: float, lr: float, seeds: tuple[int, ...]
) -> Iterator[RunConfig]:
    """One run for each seed."""
    depth = {"model_options": {"depth": layers}} if fields["model"].startswith("experiments") else {}
    for seed in seeds:
        own = {"method_options": {"alpha": alpha}, "lr": lr, "seed": seed}
        yield RunConfig.create(**COMMON, **fields, **depth, **own)


def accuracy(config: RunConfig, folder: Path) -> float:
    """On the validation images; a run that diverged counts as chance."""
    return run(config, folder, test=False).get("val_accuracy") or 0.1


def main() -> None:
    options = arguments(__doc__, "runs/alpha").parse_args()
    body, pool = [], ProcessPoolExecutor(options.jobs, multiprocessing.get_context("forkserver"))
    with pool:
        waiting = {
            (layers, branches, alpha, lr): [
                pool.submit(accuracy, c, options.out / f"{layers}-alpha{alpha}-lr{lr}-s{c.seed}")
                for c in runs(layers, fields, alpha, lr, seeds)
            ]
            for layers, branches, fields, alphas, lrs, seeds in GRID
            for alpha in alphas
            for lr in lrs
        }
        for key, futures in waiting.items():
            body.append([*key, percent([future.result() for future in futures]), len(futures)])
            print(*body[-1], flush=True)
    conclude(options.out, COMMAND, markdown(["layers", "L", "α", "lr", "validation, %", "seeds"], body))


if __name__ == "__main__":
    main()
