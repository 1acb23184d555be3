"""Adaptive gradient clipping at batch 4, family by family, on validation images: is λ needed where few images meet?

    python -m experiments.small_batch [NAME …] [--out runs/small-batch] [--jobs 2]

Nets and budgets of `experiments.families` at batch 4 (3,000 images of Fashion-MNIST, 2 epochs), converted by `nf`,
at three learning rates, one seed a net. The test split is never read. About 15 minutes on 2 cores. Interrupted, the
same command goes on.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from experiments.common import arguments, conclude, markdown, percent
from nfnets.train import RunConfig, run

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


def accuracy(net: str, clipping: float | None, lr: float, seed: int, out: Path) -> float:
    """On the validation images; a run that diverged counts as chance."""
    model = "bn_resnet14_cifar" if net == "resnet" else f"experiments.nets:{net}"
    config = RunConfig.create(**COMMON, model=model, clipping=clipping, lr=lr, seed=seed)
    return run(config, out / f"{net}-clip{clipping}-lr{lr}-s{seed}", test=False).get("val_accuracy") or 0.1


def main() -> None:
    parser = arguments(__doc__, "runs/small-batch")
    parser.add_argument("nets", nargs="*", default=NETS, metavar="NAME", help=", ".join(NETS))
    options = parser.parse_args()
    found: dict[tuple[str, float | None, float], list[float]] = {}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("forkserver")) as pool:
        waiting = {
            (net, clipping, lr, seed): pool.submit(accuracy, net, clipping, lr, seed, options.out)
            for seed in SEEDS
            for net in options.nets
            for clipping in LAMBDAS
            for lr in LRS
        }
        for (net, clipping, lr, seed), future in waiting.items():
            found.setdefault((net, clipping, lr), []).append(future.result())
            print(net, clipping, lr, seed, f"{future.result():.3f}", flush=True)
    body = [
        [net, "off" if clipping is None else clipping, *(percent(found[net, clipping, lr]) for lr in LRS)]
        for net in options.nets
        for clipping in LAMBDAS
    ]
    conclude(options.out, COMMAND, markdown(["net", "λ", *(f"lr {lr}" for lr in LRS)], body))


if __name__ == "__main__":
    main()
