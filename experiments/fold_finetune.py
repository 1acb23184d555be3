"""Fold and fine-tune: does a trained net without its norm layers learn on at batch 4 as well as BatchNorm at its best?

    python -m experiments.fold_finetune [--out runs/fold-finetune]

ResNet-14 is trained with BatchNorm on 12,000 images of Fashion-MNIST, one net a seed. Each is then fine-tuned for one
more epoch on the same images (so that the validation images stay unseen) as it is and folded, at batch 4, 16 and 64,
with equal budgets of learning rates. BatchNorm's best batch size is chosen on validation data. Interrupted, the same
command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nfnets.train.config import RunConfig
from nfnets.train.engine import run
from nfnets.train.experiment import Event, run_experiment
from nfnets.train.protocol import ExperimentConfig
from nfnets.train.report import write_report
from nfnets.train.statistics import mean_interval, paired_difference

MODEL: dict[str, Any] = {
    "model": "bn_resnet14_cifar",
    "data": "fashion-mnist",
    "train_limit": 13334,
    "threads": 1,
}
TUNING_SEED, SEEDS, BATCHES = 100, (0, 1, 2), (4, 16, 64)
# At batch 4; with the square root of the batch size at the others.
LRS = {"bn": (0.001, 0.003, 0.01), "fold": (0.0003, 0.001, 0.003)}


def trained(out: Path) -> Path:
    """Train the nets to start from; where their weights are, by seed."""
    for seed in (TUNING_SEED, *SEEDS):
        config = RunConfig.create(**MODEL, epochs=4, batch_size=64, lr=0.1, seed=seed)
        run(config, out / f"s{seed}")
    return out / "s{seed}" / "model.safetensors"


def fine_tuned(start: Path, out: Path, jobs: int) -> dict[str, Any]:
    """Fine-tune them as they are and folded."""
    config = ExperimentConfig.create(
        run={**MODEL, "epochs": 1, "init_from": str(start)},
        arms=[{"name": name, "method": name, "lrs": lrs} for name, lrs in LRS.items()],
        lrs=LRS["bn"],
        batch_sizes=BATCHES,
        lr_scaling="sqrt",
        seeds=SEEDS,
        tuning_seed=TUNING_SEED,
    )
    results = run_experiment(
        config, out, watch=_say, command="python -m experiments.fold_finetune", jobs=jobs
    )
    write_report(out)
    return results


def verdict(results: dict[str, Any]) -> str:
    """Folded at batch 4 against BatchNorm at the batch size that is best for it on validation data."""

    def accuracies(arm: str, batch_size: int, split: str) -> list[float]:
        finals = [
            r for r in results["runs"] if r["final"] and (r["arm"], r["batch_size"]) == (arm, batch_size)
        ]
        return [r[f"{split}_accuracy"] or 0.1 for r in sorted(finals, key=lambda r: r["seed"])]

    best = max(BATCHES, key=lambda batch: mean_interval(accuracies("bn", batch, "val")).mean)
    folded, bn = accuracies("fold", 4, "test"), accuracies("bn", best, "test")
    d = paired_difference(folded, bn)
    return (
        f"folded, batch 4: {100 * mean_interval(folded).mean:.2f} %; BatchNorm at its best batch size, {best}: "
        f"{100 * mean_interval(bn).mean:.2f} %; difference {100 * d.mean:+.2f} points "
        f"[{100 * d.low:+.2f}, {100 * d.high:+.2f}], {d.n} seeds"
    )


def _say(event: Event) -> None:
    if event.kind == "end":
        print(f"{event.trial.folder}: validation {event.row['val_accuracy']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/fold-finetune"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    options = parser.parse_args()
    start = trained(options.out / "trained")
    print(verdict(fine_tuned(start, options.out / "fine-tuned", options.jobs)))


if __name__ == "__main__":
    main()
