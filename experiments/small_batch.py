"""Adaptive gradient clipping at batch 4, family by family, on validation images: is λ needed where few images meet?

    python -m experiments.small_batch [NAME …] [--out runs/small-batch] [--jobs 2]

Nets and budgets of `experiments.families` at batch 4 (3,000 images of Fashion-MNIST, 2 epochs), converted by `nf`,
at three learning rates, one seed a net. The test split is never read. About 15 minutes on 2 cores. Interrupted, the
same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def grid(nets: Sequence[str], out: Path, **fields: Any) -> list[Cell]:
    """A run for each seed, net, λ and rate; `fields` replace the runs' own."""
    return [
        (
            {"net": net, "clipping": clipping, "lr": lr, "seed": seed},
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
    ]


def label(clipping: float | None) -> str:
    """λ in figures and tables."""
    return "off" if clipping is None else f"{clipping:g}"


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each net and λ, a column for each rate."""
    rates = list(grouped(runs, "lr"))
    cells = grouped(runs, "net", "clipping", "lr")
    body = [
        [net, label(clipping), *(percent(cells[net, clipping, lr]) for lr in rates)]
        for net, clipping in grouped(runs, "net", "clipping")
    ]
    return markdown(["net", "λ", *(f"lr {lr}" for lr in rates)], body)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Validation accuracy against the learning rate, a panel for each net, a line for each λ."""
    nets, rates = list(grouped(runs, "net")), list(grouped(runs, "lr"))
    figure, axes = panels(len(nets), width=2.4 * len(nets) + 0.8, height=3.3, sharey=True)
    cells = grouped(runs, "net", "clipping", "lr")
    for axis, net in zip(axes, nets, strict=True):
        for number, clipping in enumerate(grouped(runs, "clipping")):
            seeds = [cells[net, clipping, lr] for lr in rates]
            band(axis, rates, seeds, number, label(clipping))
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{lr:g}" for lr in rates])
        axis.minorticks_off()
        axis.set_title(net, fontsize=11)
        axis.set_xlabel("learning rate")
    axes[0].legend(frameon=False, fontsize=8, title="λ")
    percent_axis(axes[0], "validation accuracy")
    save(figure, path)


def main() -> None:
    parser = arguments(__doc__, "runs/small-batch")
    parser.add_argument("nets", nargs="*", default=NETS, metavar="NAME", help=", ".join(NETS))
    options = parser.parse_args()
    runs = validate(grid(options.nets, options.out), options.out, COMMAND, options.jobs)
    draw(runs, options.out / "small_batch.png")
    conclude(options.out, COMMAND, __doc__, table(runs))


if __name__ == "__main__":
    main()
