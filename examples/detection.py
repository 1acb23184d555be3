"""Faster R-CNN at batch 2, where BatchNorm is usually frozen: the backbone is trained from scratch without it.

python examples/detection.py --smoke
python examples/detection.py --steps 100       # loss 1.75, 0.73, 0.50, 0.36, 0.47 at steps 0, 20, …, 80; last 0.39
python examples/detection.py --steps 100 --arm bn    # the same with BatchNorm: 1.83, 0.96, 0.95, 0.71, 0.87; last 0.79

One run of each, on one CPU core (150 s): the loss falls; neither finds an object yet, and nothing is compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from shapes import CLASSES, scene
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import box_iou

import nfnets
from nfnets import verify


def detector(backbone: str, size: int) -> FasterRCNN:
    """torchvision's Faster R-CNN on a feature pyramid, every layer trainable, with live BatchNorm."""
    options: dict[str, Any] = {"weights": None, "norm_layer": nn.BatchNorm2d}
    heads: dict[str, Any] = {"num_classes": len(CLASSES), "min_size": size, "max_size": size}
    if backbone.startswith("resnet"):
        features = resnet_fpn_backbone(backbone_name=backbone, trainable_layers=5, **options)
        return FasterRCNN(features, **heads)
    features = mobilenet_backbone(backbone_name=backbone, fpn=True, trainable_layers=6, **options)
    # Three levels, the first of stride 16: as torchvision's fasterrcnn_mobilenet_v3_large_fpn, for small objects.
    anchors = AnchorGenerator(((16, 32, 64, 128),) * 3, ((0.5, 1.0, 2.0),) * 3)
    return FasterRCNN(features, rpn_anchor_generator=anchors, **heads)


def recall(model: FasterRCNN, size: int, scenes: range) -> float:
    """Fraction of the objects found with the right label at an intersection over union of 0.5 or more."""
    model.eval()
    found = total = 0
    for seed in scenes:
        image, target, _ = scene(size, seed)
        with torch.no_grad():
            (guess,) = model([image])
        keep = guess["scores"] > 0.5
        overlap = box_iou(target["boxes"], guess["boxes"][keep])
        right = (overlap >= 0.5) & (target["labels"][:, None] == guess["labels"][keep][None])
        found, total = found + int(right.any(1).sum()), total + len(target["boxes"])
    return found / total


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two steps: does everything work here?")
    parser.add_argument("--arm", choices=("nf", "bn"), default="nf")
    parser.add_argument(
        "--backbone", choices=("mobilenet_v3_large", "resnet18", "resnet50"), default="mobilenet_v3_large"
    )
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    size, steps = (64, 2) if args.smoke else (128, args.steps)
    model = detector(args.backbone, size)
    if args.arm == "nf":
        # The backbone is what holds norm layers. It is converted on what it will see: normalized images.
        images, _ = model.transform([scene(size, seed)[0] for seed in range(32)])
        model.backbone = nfnets.convert(model.backbone, images.tensors, batch_size=2)
        print(verify.batch_independence(model.backbone, images.tensors[:2]))
    optimizer = torch.optim.SGD(
        nfnets.param_groups(model, lr=0.01, weight_decay=1e-4), momentum=0.9, nesterov=True
    )
    # By hand: both arms are clipped alike, at 2 images per step just enough to stop a step that would break the net.
    given = {"clipping": 0.16, "head": None, "centralization": False}
    nfnets.attach(optimizer, model, **given, exclude="roi_heads.box_predictor.*")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        cycle_momentum=False,
    )
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        model.train()
        batch = [scene(size, 1000 + 2 * step + i) for i in range(2)]
        losses = model([image for image, _, _ in batch], [target for _, target, _ in batch])
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    result = {"loss": loss.item(), "recall": recall(model, size, range(2 if args.smoke else 50))}
    print(f"{args.arm}: last loss {result['loss']:.3f}, recall {result['recall']:.1%}")
    return result


if __name__ == "__main__":
    main()
