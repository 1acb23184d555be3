"""Nets full of dropout, by `nf` against BatchNorm: ContraWR's encoder, Deep4Net and eight linear layers, p = 0.5.

    python -m experiments.dropout [NAME …] [--arms ARM …] [--seeds 5] [--tuning-seeds 1] [--epochs 8]

Digits (1,294 training images of 8×8 pixels, not augmented), batch 64. Two of the nets are made for EEG: an
image stands for its spectrogram, or the image's rows for electrodes. The arms, `nf` with and without channel
statistics, search five learning rates on validation data with tuning seeds, then run with paired seeds on the test
split. About 2 minutes a net on 2 cores. Interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import (
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
LRS = (0.02, 0.05, 0.1, 0.2, 0.4)
ARMS: tuple[dict[str, Any], ...] = (
    {"name": "bn", "method": "bn"},
    {"name": "nf", "method": "nf"},
    {"name": "nf-whole", "method": "nf", "method_options": {"channelwise": False}},
)
NAMES = {"bn": "BatchNorm", "nf": "`nf`", "nf-whole": "`nf`, `channelwise=False`"}
COMMAND = "python -m experiments.dropout"


def experiment(
    net: str, epochs: int = 8, arms: Sequence[str] = tuple(NAMES), **fields: Any
) -> ExperimentConfig:
    """The arms on one net, all but the augmentation a default."""
    run = {
        "model": f"experiments.nets:{net}",
        "data": "digits",
        "epochs": epochs,
        "eval_every": 0,
        "augment": "none",
    }
    return ExperimentConfig.create(
        **{
            "run": run | {"threads": 1},
            "arms": [arm for arm in ARMS if arm["name"] in arms],
            "lrs": LRS,
            "batch_sizes": [BATCH],
            "seeds": range(5),
            "tuning_seeds": [TUNING_SEED],
        }
        | fields
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    """Chosen rates, test accuracy in percent over seeds, and the paired difference, as Markdown."""
    lines = []
    for net, results in found.items():
        rates = {chosen["arm"]: f"{chosen['lr']:g}" for chosen in results["chosen"]}
        bn, *_ = scores = {arm: accuracies(results, arm, BATCH) for arm in rates}
        for arm, score in scores.items():
            difference = "" if arm == bn else compared(score, scores[bn])
            lines.append([NETS[net], NAMES[arm], rates[arm], percent(score), difference])
    return markdown(["net", "arm", "lr", "test, %", "less BatchNorm, points [95 %]"], lines)


def main() -> None:
    parser = arguments(__doc__, "runs/dropout")
    parser.add_argument("--arms", nargs="+", choices=tuple(NAMES), default=tuple(NAMES))
    parser.add_argument("--seeds", type=int, default=5, help="reported; from 0")
    parser.add_argument("--tuning-seeds", type=int, default=1, help="to choose rates by")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("nets", nargs="*", default=tuple(NETS), metavar="NAME", help=", ".join(NETS))
    options = parser.parse_args()
    out: Path = options.out
    tuning = range(TUNING_SEED, TUNING_SEED + options.tuning_seeds)
    chosen = f"{' '.join(options.nets)} --arms {' '.join(options.arms)} --epochs {options.epochs}"
    command = f"{COMMAND} {chosen} --seeds {options.seeds} --tuning-seeds {options.tuning_seeds}"
    found = {}
    for net in options.nets:
        seeds = {"seeds": range(options.seeds), "tuning_seeds": tuning}
        config = experiment(net, options.epochs, options.arms, **seeds)
        found[net] = sweep(config, out / net, command, options.jobs)
    conclude(out, command, __doc__, table(found))


if __name__ == "__main__":
    main()
