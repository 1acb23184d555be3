"""What makes the logits, clipped or not, where steps are few and large: batch 128 and 512, on validation images.

    python -m experiments.large_batch [--out runs/large-batch] [--jobs 2]

ResNet-8 on 1,600 images of Fashion-MNIST, batch 128 for 4 epochs and 512 for 16 (48 steps), as in
`experiments.batch_size`: BatchNorm, and `nf` with the head clipped as the recipe says or left alone, as in the paper;
two learning rates, three seeds. The test split is never read. About 8 core minutes. Interrupted, the same command
goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.batch_size import DATA, EPOCHS, RUN
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
from nfnets.train import RunConfig, method_defaults

COMMAND = "python -m experiments.large_batch"
ARMS: dict[str, dict[str, Any]] = {
    "BatchNorm": {"method": "bn"},
    "NF": {"method": "nf"},
    "NF, head unclipped": {"method": "nf", "clipping_head": None},
}
LRS = {128: (0.144, 0.432), 512: (0.288, 0.864)}
SEEDS = (0, 1, 2)
COMMON: dict[str, Any] = RUN | DATA["fashion-mnist"]


def grid(out: Path, seeds: Sequence[int] = SEEDS, **fields: Any) -> list[Cell]:
    """A run for each batch size, rate, arm and seed; `fields` replace the runs' own."""
    cells = []
    for seed in seeds:
        for batch, lrs in LRS.items():
            for lr in lrs:
                for name, arm in ARMS.items():
                    given = COMMON | {"epochs": EPOCHS[batch]} | fields
                    given |= method_defaults.recipe(arm["method"], batch) | arm
                    config = RunConfig.create(**given, batch_size=batch, lr=lr, seed=seed)
                    row = {"batch": batch, "arm": name, "lr": lr, "seed": seed}
                    cells.append((row, config, out / f"{name.replace(' ', '-')}-b{batch}-lr{lr}-s{seed}"))
    return cells


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each batch size and arm, a column for each of the two rates."""
    cells = grouped(runs, "batch", "arm", "lr")
    body = [
        [batch, arm, *(f"{percent(cells[batch, arm, lr])} (lr {lr})" for lr in LRS[batch])]
        for batch, arm in grouped(runs, "batch", "arm")
    ]
    return markdown(["batch", "arm", "lower rate", "higher rate"], body)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Validation accuracy against the learning rate, a panel for each batch size, a line for each arm."""
    batches = list(grouped(runs, "batch"))
    figure, axes = panels(len(batches), width=3.4 * len(batches), height=3.4, sharey=True)
    cells = grouped(runs, "batch", "arm", "lr")
    for axis, batch in zip(axes, batches, strict=True):
        lrs = LRS[batch]
        for number, arm in enumerate(ARMS):
            band(axis, lrs, [cells[batch, arm, lr] for lr in lrs], number, arm)
        axis.set_xscale("log")
        axis.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        axis.minorticks_off()
        axis.set_title(f"batch {batch}", fontsize=11)
        axis.set_xlabel("learning rate")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    percent_axis(axes[0], "validation accuracy")
    save(figure, path)


def main() -> None:
    options = arguments(__doc__, "runs/large-batch").parse_args()
    runs = validate(grid(options.out), options.out, COMMAND, options.jobs)
    draw(runs, options.out / "large_batch.png")
    conclude(options.out, COMMAND, __doc__, table(runs))


if __name__ == "__main__":
    main()
