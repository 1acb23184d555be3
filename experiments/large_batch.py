"""Adaptive gradient clipping at batch 512, on validation images: how tight must λ be where steps are few and large?

    python -m experiments.large_batch [--out runs/large-batch] [--jobs 2]

ResNet-8 on 1,600 images of Fashion-MNIST, batch 512, 16 epochs (48 steps), as in `experiments.batch_size`, converted by
`nf`; three λ, that of the rule first, at two learning rates, and BatchNorm; four seeds. The test split is never read.
About 20 core minutes. Interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.batch_size import DATA, EPOCHS, RUN
from experiments.common import Cell, arguments, conclude, validate
from experiments.small_batch import draw, table
from nfnets.train import RunConfig

COMMAND = "python -m experiments.large_batch"
BATCH = 512
ARMS: tuple[tuple[str, float | None], ...] = (("bn", None), ("nf", 0.025), ("nf", 0.0125), ("nf", 0.006))
LRS = (0.096, 0.288)
SEEDS = (100, 101, 102, 103)
COMMON: dict[str, Any] = RUN | DATA["fashion-mnist"] | {"batch_size": BATCH, "epochs": EPOCHS[BATCH]}


def grid(out: Path, seeds: Sequence[int] = SEEDS, **fields: Any) -> list[Cell]:
    """A run for each arm, rate and seed; `fields` replace the runs' own."""
    return [
        (
            {"net": method, "clipping": clipping, "lr": lr, "seed": seed},
            RunConfig.create(**(COMMON | fields), method=method, clipping=clipping, lr=lr, seed=seed),
            out / f"{method}-clip{clipping}-lr{lr}-s{seed}",
        )
        for seed in seeds
        for method, clipping in ARMS
        for lr in LRS
    ]


def main() -> None:
    options = arguments(__doc__, "runs/large-batch").parse_args()
    runs = validate(grid(options.out), options.out, COMMAND, options.jobs)
    draw([run for run in runs if run["net"] == "nf"], options.out / "large_batch.png")
    conclude(options.out, COMMAND, table(runs))


if __name__ == "__main__":
    main()
