"""From scratch, family by family: converted by `nf` against BatchNorm at batch 64 and at batch 4, Fashion-MNIST.

    python -m experiments.families [NAME …] [--out runs/families] [--jobs 2]

Small nets (experiments/nets.py), equal budgets of learning rates on validation data with a tuning seed, then five
paired seeds on the test split. Everything else is a default: whoever calls `nfnets compare` trains the same way. About
10 minutes a family on 2 cores, DenseNet 40. Interrupted, the same command goes on; finished, it prints the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common import (
    TUNING_SEED,
    accuracies,
    arguments,
    compared,
    limits,
    markdown,
    more_evidence,
    percent,
    sweep,
)
from nfnets.train.compare import ExperimentConfig
from nfnets.train.compare.report import write_report

FAMILIES = ("efficientnet", "mobilenetv3", "mobilenetv2", "vgg", "densenet")
# Images (validation included), epochs and learning rates for each batch size.
BUDGETS = {
    64: (6667, 4, (0.025, 0.05, 0.1, 0.2)),
    4: (3334, 2, (0.001, 0.003, 0.01, 0.03, 0.1)),
    2: (3334, 2, (0.003, 0.01, 0.03, 0.1)),
}


def compare(
    family: str, batch_size: int, out: Path, jobs: int, seeds: int = 5, validation: int | None = None
) -> dict[str, Any]:
    """The results of one family at one batch size; `validation` images instead of a tenth choose the rates."""
    images, epochs, lrs = BUDGETS[batch_size]
    command = f"python -m experiments.families {family} --batch {batch_size} --seeds {seeds}"
    command += f" --validation {validation}" if validation else ""
    config = ExperimentConfig.create(
        run={
            "model": f"experiments.nets:{family}",
            "data": "fashion-mnist",
            "epochs": epochs,
            "threads": 1,
            **limits(images, validation),
        },
        arms=[{"name": "bn", "method": "bn"}, {"name": "nf", "method": "nf"}],
        lrs=lrs,
        batch_sizes=[batch_size],
        tuning_seeds=[TUNING_SEED],
        seeds=range(seeds),
    )
    results = sweep(config, out / f"{family}-b{batch_size}", command, jobs)
    write_report(out / f"{family}-b{batch_size}")
    return results


def table(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Test accuracy in percent, mean and standard deviation over seeds, and the paired difference, as Markdown."""
    lines = []
    for (family, batch_size), results in found.items():
        bn, nf = (accuracies(results, arm, batch_size) for arm in ("bn", "nf"))
        lines.append((family, batch_size, percent(bn), percent(nf), compared(nf, bn), len(nf)))
    head = ("family", "batch", "BN, %", "NF, %", "NF − BN, points [95 % interval]", "seeds")
    return markdown(head, lines)


def main() -> None:
    parser = arguments(__doc__, "runs/families")
    parser.add_argument("families", nargs="*", default=FAMILIES, metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument(
        "--batch", type=int, choices=sorted(BUDGETS), action="append", help="default: 64 and 4"
    )
    more_evidence(parser, seeds=5)
    options = parser.parse_args()
    found = {}
    for batch_size in options.batch or (64, 4):
        for family in options.families:
            found[family, batch_size] = compare(
                family, batch_size, options.out, options.jobs, options.seeds, options.validation
            )
    print(table(found))


if __name__ == "__main__":
    main()
