"""Adaptive gradient clipping at batch 4, family by family, on validation images: is λ needed where few images meet?

    python -m experiments.small_batch [NAME …] [--out runs/small-batch] [--jobs 2]

Nets and budgets of `experiments.families` at batch 4 (3,000 images of Fashion-MNIST, 2 epochs), converted by `nf`,
at three learning rates, one seed a net. The test split is never read. About 15 minutes on 2 cores. Interrupted, the
same command goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.common import arguments, conclude, markdown, percent, validate
from nfnets.train import RunConfig

COMMAND = "python -m experiments.small_batch"
NETS = ("mobilenetv2", "efficientnet", "resnet", "vgg", "mobilenetv3")
LAMBDAS = (None, 0.28, 0.08, 0.02)
LRS = (0.003, 0.01, 0.03)
SEEDS = (100,)
COMMON = {
    "method": "nf",
    "data": "fashion-mnist",
    "train_limit": 3334,
    "epochs": 2,
    "batch_size": 4,
    "threads": 1,
    "eval_every": 0,
}


Cell = tuple[str, float | None, float]
"""Net, λ, learning rate."""


def grid(nets: Sequence[str], out: Path, **fields: Any) -> dict[tuple[Cell, int], tuple[RunConfig, Path]]:
    """By cell and seed: the run and its folder; `fields` replace the runs' own."""
    return {
        ((net, clipping, lr), seed): (
            RunConfig.create(
                **(COMMON | fields),
                model="bn_resnet14_cifar" if net == "resnet" else f"experiments.nets:{net}",
                clipping=clipping,
                lr=lr,
                seed=seed,
            ),
            out / f"{net}-clip{clipping}-lr{lr}-s{seed}",
        )
        for seed in SEEDS
        for net in nets
        for clipping in LAMBDAS
        for lr in LRS
    }


def table(found: Iterable[tuple[tuple[Cell, int], float]]) -> str:
    """A row for each net and λ, a column for each rate."""
    rows: dict[tuple[str, float | None], dict[float, list[float]]] = {}
    for ((net, clipping, lr), seed), accuracy in found:
        rows.setdefault((net, clipping), {}).setdefault(lr, []).append(accuracy)
        print(net, clipping, lr, seed, f"{accuracy:.3f}", flush=True)
    body = [
        [net, "off" if clipping is None else clipping, *(percent(values) for values in by_lr.values())]
        for (net, clipping), by_lr in rows.items()
    ]
    return markdown(["net", "λ", *(f"lr {lr}" for lr in LRS)], body)


def main() -> None:
    parser = arguments(__doc__, "runs/small-batch")
    parser.add_argument("nets", nargs="*", default=NETS, metavar="NAME", help=", ".join(NETS))
    options = parser.parse_args()
    conclude(options.out, COMMAND, table(validate(grid(options.nets, options.out), options.jobs)))


if __name__ == "__main__":
    main()
