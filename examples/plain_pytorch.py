"""A BatchNorm ResNet without BatchNorm, in plain PyTorch: plan, convert, look, train, prove, save.

python examples/plain_pytorch.py --smoke      # seconds
python examples/plain_pytorch.py              # two minutes on 2 cores
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import nfnets
from nfnets import verify
from nfnets.hub import Recipe, from_pretrained, save_pretrained

NAME = "bn_resnet20_cifar"


def digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's 1,797 digits, 8 × 8 pixels: training and test split."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def accuracy(model: torch.nn.Module, data: TensorDataset) -> float:
    model.eval()
    with torch.no_grad():
        images, labels = data.tensors
        return (model(images).argmax(1) == labels).float().mean().item()


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps: does everything work here?")
    parser.add_argument("--out", type=Path, default=Path("runs/plain-pytorch"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    train, test = digits()
    epochs, steps = (1, 3) if args.smoke else (12, None)

    # 1. Convert. Constants are measured on these images; the original stays as it is.
    bn = nfnets.create_model(NAME, num_classes=10, in_chans=1)
    images = train.tensors[0][:64]
    print(nfnets.plan(bn, images, batch_size=64).summary())
    model = nfnets.convert(bn, images, batch_size=64)

    # 2. Look at both before spending an hour on training.
    report = nfnets.profile({"bn": bn, "nf": model}, images)
    print(report.check())
    args.out.mkdir(parents=True, exist_ok=True)
    report.to_html(args.out / "signal.html")

    # 3. Train. Gains, biases and scalars are not decayed; `attach` does what the method needs before a step.
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(
        nfnets.param_groups(model, lr=0.1, weight_decay=5e-4), momentum=0.9, nesterov=True
    )
    clipping = nfnets.attach(optimizer, model).clipping
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=epochs * (steps or len(loader)),
        cycle_momentum=False,
    )
    with nfnets.probe(model, every=50, agc=clipping) as probe:
        for epoch in range(epochs):
            model.train()
            for step, (x, y) in enumerate(loader):
                if step == steps:
                    break
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            print(
                f"epoch {epoch}: loss {loss:.3f}, clipped {float(clipping.stats.fraction):.1%} of the units"
            )
    probe.report().to_html(args.out / "training.html")

    # 4. Prove that no sample sees another one, and keep the model.
    print(verify.batch_independence(model, images))
    recipe = Recipe(NAME, "nf", num_classes=10, channels=1, size=8)
    again = from_pretrained(save_pretrained(model, args.out / "model", recipe))
    result = accuracy(again, test)
    print(f"test accuracy {result:.1%}; wrote {args.out}/signal.html, training.html, model/")
    return result


if __name__ == "__main__":
    main()
