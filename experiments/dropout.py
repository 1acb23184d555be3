"""Nets full of dropout, by `nf` against BatchNorm: ContraWR's encoder, Deep4Net and eight linear layers, p = 0.5.

    python -m experiments.dropout [NAME …] [--out runs/dropout] [--jobs 2]

Digits (1,294 training images of 8×8 pixels), 8 epochs, batch 64. Two of the nets are made for EEG: an image stands for
its spectrogram, or the image's rows for electrodes. Both arms search two learning rates on validation data with a
tuning seed, then run with three paired seeds on the test split. About 3 minutes on 2 cores. Interrupted, the same
command goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common import (
    SEEDS,
    TUNING_SEED,
    accuracies,
    arguments,
    compared,
    conclude,
    markdown,
    percent,
    sweep,
)
from nfnets.train.compare import ExperimentConfig

NETS = {"contrawr": "ContraWR's encoder", "deep4": "Deep4Net", "dropped": "eight linear layers"}
BATCH = 64
LRS = (0.03, 0.1)
COMMAND = "python -m experiments.dropout"


def experiment(net: str, **fields: Any) -> ExperimentConfig:
    """BatchNorm and `nf` on one net, everything else a default."""
    run = {"model": f"experiments.nets:{net}", "data": "digits", "epochs": 8, "eval_every": 0}
    return ExperimentConfig.create(
        **{
            "run": run | {"threads": 1},
            "arms": [{"name": "bn", "method": "bn"}, {"name": "nf", "method": "nf"}],
            "lrs": LRS,
            "batch_sizes": [BATCH],
            "seeds": SEEDS,
            "tuning_seeds": [TUNING_SEED],
        }
        | fields
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    """Chosen rates, test accuracy in percent over seeds, and the paired difference, as Markdown."""
    lines = []
    for net, results in found.items():
        bn, nf = (accuracies(results, arm, BATCH) for arm in ("bn", "nf"))
        rates = {c["arm"]: f"{c['lr']:g}" for c in results["chosen"]}
        lines.append([NETS[net], rates["bn"], rates["nf"], percent(bn), percent(nf), compared(nf, bn)])
    return markdown(["net", "lr, BN", "lr, NF", "BN, %", "NF, %", "NF − BN, points [95 %]"], lines)


def main() -> None:
    parser = arguments(__doc__, "runs/dropout")
    parser.add_argument("nets", nargs="*", default=tuple(NETS), metavar="NAME", help=", ".join(NETS))
    options = parser.parse_args()
    out: Path = options.out
    found = {net: sweep(experiment(net), out / net, COMMAND, options.jobs) for net in options.nets}
    conclude(out, COMMAND, table(found))


if __name__ == "__main__":
    main()
