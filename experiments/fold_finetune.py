"""Fold and fine-tune: does a trained net without its norm layers learn on at batch 4 as well as BatchNorm at its best?

    python -m experiments.fold_finetune [--out runs/fold-finetune]

ResNet-14 is trained with BatchNorm on 12,000 images of Fashion-MNIST, one net a seed. Each is then fine-tuned for one
epoch on 20,000 (those and 8,000 new ones) as it is and folded, at batch 4, 16 and 64. BatchNorm's best batch size is
chosen on validation data. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nfnets.train.config import RunConfig
from nfnets.train.engine import run
from nfnets.train.experiment import run_experiment
from nfnets.train.protocol import ExperimentConfig
from nfnets.train.report import write_report
from nfnets.train.statistics import mean_interval, paired_difference

MODEL = {"model": "bn_resnet14_cifar", "data": "fashion-mnist", "threads": 1}
TUNING_SEED, SEEDS, BATCHES = 100, (0, 1, 2), (4, 16, 64)


def trained(out: Path) -> Path:
    """The nets to start from; where their weights are, by seed."""
    for seed in (TUNING_SEED, *SEEDS):
        config = RunConfig.create(**MODEL, train_limit=13334, epochs=4, batch_size=64, lr=0.1, seed=seed)
        run(config, out / f"s{seed}")
    return out / "s{seed}" / "model.safetensors"


def experiment(start: Path) -> ExperimentConfig:
    """Equal budgets: three rates for each arm at each batch size."""
    return ExperimentConfig.create(
        run={**MODEL, "train_limit": 22222, "epochs": 1, "init_from": str(start)},
        arms=[{"name": "bn", "method": "bn"}, {"name": "fold", "method": "fold", "lrs": FOLD_LRS}],
        lrs=BN_LRS,
        batch_sizes=BATCHES,
        lr_scaling="sqrt",
        seeds=SEEDS,
        tuning_seed=TUNING_SEED,
    )
