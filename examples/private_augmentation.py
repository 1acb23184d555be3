"""Differential privacy with several views of each image: augmentation multiplicity by Opacus (arXiv 2204.13650).

Each image is shown K times, each time augmented anew. The gradients of its K views are averaged before they are
clipped, so the image's share of a step stays bounded by the clipping norm: privacy costs what it costs with one view.
Opacus has no switch for it (its issue 455); three lines do it.

pip install opacus
python examples/private_augmentation.py --smoke     # seconds
python examples/private_augmentation.py             # four minutes on 2 cores
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nfnets
import nfnets.privacy  # tells Opacus what it must know of converted models

DELTA = 1e-4


def views(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(N, C, H, W) → (N · count, C, H, W): each image shifted by up to one pixel, `count` times in a row."""
    repeated = images.repeat_interleave(count, 0)
    shifts = torch.randint(-1, 2, (len(repeated), 2), generator=generator)
    padded = F.pad(repeated, (1, 1, 1, 1), value=-1.0)
    height, width = images.shape[-2:]
    rows = (shifts[:, :1] + 1 + torch.arange(height)).view(-1, 1, height, 1)
    columns = (shifts[:, 1:] + 1 + torch.arange(width)).view(-1, 1, 1, width)
    number = torch.arange(len(repeated)).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return padded[number, channel, rows, columns]


def average_over_views_(parameters: Iterable[nn.Parameter], count: int) -> None:
    """Replace the gradients of `count` views of each image by their mean, before the optimizer clips and adds noise."""
    for p in parameters:
        if p.requires_grad:
            gradients: Tensor = p.grad_sample  # type: ignore[attr-defined]
            p.grad_sample = gradients.unflatten(0, (-1, count)).mean(1)  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps: does everything work here?")
    parser.add_argument("--views", type=int, default=4, help="how often each image is shown in a step")
    args = parser.parse_args(argv)
    from opacus import PrivacyEngine

    warnings.simplefilter("ignore")  # of insecure random numbers: fine for a trial, not for release
    torch.manual_seed(0)
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels))
    train, test = order[:1437], order[1437:]

    bn = nfnets.create_model("bn_resnet8_cifar", num_classes=10, in_chans=1)
    model = nfnets.convert(bn, torch.randn(256, 1, 8, 8))  # noise: constants are not protected
    engine = PrivacyEngine()
    epochs = 1 if args.smoke else 10
    private, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
        data_loader=DataLoader(TensorDataset(images[train], labels[train]), batch_size=128),
        epochs=epochs,
        target_epsilon=8.0,
        target_delta=DELTA,
        max_grad_norm=1.0,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for step, (x, y) in enumerate(loader):
            if args.smoke and step == 2:
                break
            optimizer.zero_grad()
            shown = private(views(x, args.views, generator))
            F.cross_entropy(shown, y.repeat_interleave(args.views)).backward()
            average_over_views_(model.parameters(), args.views)
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    epsilon = engine.get_epsilon(DELTA)
    print(f"{args.views} views: test accuracy {accuracy:.3f} at ε = {epsilon:.2f}, δ = {DELTA:g}")
    return {"accuracy": accuracy, "epsilon": epsilon}


if __name__ == "__main__":
    main()
