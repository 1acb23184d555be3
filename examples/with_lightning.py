"""The same in Lightning: one callback clips, samples the signal, logs, and writes the report.

pip install lightning
python examples/with_lightning.py --smoke
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from plain_pytorch import digits
from torch.utils.data import DataLoader

import nfnets
from nfnets.callbacks import lightning_callback


class Classifier(pl.LightningModule):
    def __init__(self, images: torch.Tensor, lr: float) -> None:
        super().__init__()
        self.lr = lr
        bn = nfnets.create_model("bn_resnet20_cifar", num_classes=10, in_chans=1)
        self.model = nfnets.convert(bn, images, batch_size=64)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = nfnets.param_groups(self.model, lr=self.lr, weight_decay=5e-4)
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps: does everything work here?")
    parser.add_argument("--out", type=Path, default=Path("runs/with-lightning"))
    args = parser.parse_args(argv)
    pl.seed_everything(0, verbose=False)
    train, test = digits()
    module = Classifier(train.tensors[0][:64], lr=0.1)
    trainer = pl.Trainer(
        accelerator="cpu" if args.smoke else "auto",
        max_epochs=1 if args.smoke else 12,
        limit_train_batches=3 if args.smoke else None,
        limit_val_batches=1 if args.smoke else None,
        # `gradient_clip_val` stays off: clipping by the global norm is another thing than AGC.
        callbacks=[lightning_callback(every=2 if args.smoke else 50, folder=args.out)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=not args.smoke,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        DataLoader(train, batch_size=64, shuffle=True, drop_last=True),
        DataLoader(test, batch_size=120),
    )
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(metrics)
    return metrics


if __name__ == "__main__":
    main()
