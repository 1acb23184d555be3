"""DeepLab v3 at batch 2, and at batch 1, where its image pooling leaves BatchNorm one value per channel.

python examples/segmentation.py --smoke
python examples/segmentation.py --steps 100    # loss 1.02, 0.62, 0.63, 0.55, 0.54 at steps 0, 20, …, 80; mean IoU 39 %
python examples/segmentation.py --batch-size 1

The losses are of one run, on one CPU core (25 s).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from shapes import CLASSES, scene
from torch import Tensor
from torchvision.models import get_model

import nfnets
from nfnets import verify


def batch_of(size: int, seeds: range) -> tuple[Tensor, Tensor]:
    """Images in [−1, 1] and masks of labels."""
    scenes = [scene(size, seed) for seed in seeds]
    return torch.stack([image for image, _, _ in scenes]) * 2 - 1, torch.stack(
        [mask for _, _, mask in scenes]
    )


def mean_iou(guess: Tensor, truth: Tensor) -> float:
    """Intersection over union, averaged over the classes that occur."""
    pairs = [(guess == label, truth == label) for label in range(len(CLASSES))]
    return float(torch.stack([(a & b).sum() / (a | b).sum() for a, b in pairs if (a | b).any()]).mean())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two steps: does everything work here?")
    parser.add_argument(
        "--backbone", choices=("mobilenet_v3_large", "resnet50"), default="mobilenet_v3_large"
    )
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    size, steps = (32, 2) if args.smoke else (96, args.steps)

    bn = get_model(
        f"deeplabv3_{args.backbone}", weights=None, weights_backbone=None, num_classes=len(CLASSES)
    )
    images, _ = batch_of(size, range(32))
    try:
        bn.train()(images[:1])
        print("BatchNorm, batch 1: runs")
    except ValueError as error:
        print(f"BatchNorm, batch 1: {error}")
    model = nfnets.convert(bn, images, batch_size=args.batch_size)
    print(verify.batch_independence(model, images[:2]))

    groups = nfnets.param_groups(model, lr=0.01, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    nfnets.attach(optimizer, model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        cycle_momentum=False,
    )
    model.train()
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        first = 1000 + args.batch_size * step
        x, y = batch_of(size, range(first, first + args.batch_size))
        loss = F.cross_entropy(model(x)["out"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    model.eval()
    x, y = batch_of(size, range(100, 102 if args.smoke else 132))
    with torch.no_grad():
        guess = torch.cat([model(part)["out"].argmax(1) for part in x.split(4)])
    result = {"loss": loss.item(), "iou": mean_iou(guess, y)}
    print(f"batch {args.batch_size}: last loss {result['loss']:.3f}, mean IoU {result['iou']:.1%}")
    return result


if __name__ == "__main__":
    main()
