"""Nets with layer, group and instance norm, and what stands for those: `dyt`, `derf`, `nf`. Fashion-MNIST.

    python -m experiments.any_norm [vit convnext unet-b1 unet-b2] [--out runs/any-norm]

A small vision transformer and a small ConvNeXt (experiments/nets.py) on 1,500 images: AdamW, 4 epochs, batch 64, and a
search of three learning rates on validation data. Then a U-Net at batch 1 and 2 that segments scenes: three garments
of Fashion-MNIST on a canvas of 40 pixels with noise, each pixel background, garment, footwear or bag; SGD, 100 steps,
the mean of the classes' intersection over union. `shifted`: the same test scenes with intensities 0.5 x + 0.3, which no
arm has seen. Every arm has the same search, then three paired seeds on the test split. Interrupted, the same command
goes on.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nfnets
from experiments.common import (
    SEEDS,
    TUNING_SEED,
    accuracies,
    arguments,
    compared,
    conclude,
    markdown,
    percent,
    search,
    sweep,
)
from experiments.nets import UNet
from nfnets.train import RunConfig
from nfnets.train.compare import ExperimentConfig
from nfnets.train.data import load

BATCH = 64
CLASSIFIERS = ("vit", "convnext")
LRS = (0.003, 0.01, 0.03)
ARMS: dict[str, dict[str, Any]] = {
    "layer norm": {"method": "bn"},
    "dyt": {"method": "dyt", "method_options": {"norms": "all"}},
    "dyt, measured": {"method": "dyt", "method_options": {"norms": "all", "alpha": "measured"}},
    "derf": {"method": "derf", "method_options": {"norms": "all"}},
    "derf, measured": {"method": "derf", "method_options": {"norms": "all", "alpha": "measured"}},
    "nf": {"method": "nf", "method_options": {"norms": "all"}},
}
UNETS = {"unet-b1": 1, "unet-b2": 2}
UNET_LRS = (0.01, 0.03, 0.1)
UNET_ARMS = ("group", "instance", "nf")
STEPS, SIDE, KINDS = 100, 40, 4
COMMAND = "python -m experiments.any_norm"


def experiment(net: str, **fields: Any) -> ExperimentConfig:
    """The six arms on one classifier."""
    run = {"data": "fashion-mnist", "train_limit": 1667, "epochs": 4, "eval_every": 0, "optimizer": "adamw"}
    run |= {"model": f"experiments.nets:{net}", "weight_decay": 0.05, "warmup_epochs": 0.5, "threads": 1}
    return ExperimentConfig.create(
        **{
            "run": run,
            "arms": [{"name": name.replace(", ", "-").replace(" ", "-")} | arm for name, arm in ARMS.items()],
            "lrs": LRS,
            "batch_sizes": [BATCH],
            "seeds": SEEDS,
            "tuning_seeds": [TUNING_SEED],
        }
        | fields
    )


@cache
def garments(split: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels of a split, "train", "val" or "test", of 4,000 images for training."""
    data: Any = load(RunConfig.create(data="fashion-mnist", train_limit=4444))
    part = getattr(data, split)
    return part.images[:, 0].float() / 255, part.labels


def scene(split: str, number: int) -> tuple[Tensor, Tensor]:
    """Three garments on a noisy canvas, and the kind of each pixel: background, garment, footwear, bag."""
    images, labels = garments(split)
    draw = torch.Generator().manual_seed(number)
    canvas = 0.1 * torch.rand((SIDE, SIDE), generator=draw)
    mask = torch.zeros((SIDE, SIDE), dtype=torch.long)
    for index in torch.randint(len(images), (3,), generator=draw).tolist():
        y, x = torch.randint(SIDE - 28, (2,), generator=draw).tolist()
        image, part = images[index], (slice(y, y + 28), slice(x, x + 28))
        inside = image > 0.15
        kind = {5: 2, 7: 2, 9: 2, 8: 3}.get(int(labels[index]), 1)
        canvas[part] = torch.where(inside, image, canvas[part])
        mask[part] = torch.where(inside, kind, mask[part])
    return canvas[None], mask


def scenes(split: str, numbers: range) -> tuple[Tensor, Tensor]:
    """Several scenes as a batch."""
    images, masks = zip(*(scene(split, number) for number in numbers), strict=True)
    return torch.stack(images), torch.stack(masks)


def mean_iou(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Intersection over union, averaged over the four kinds."""
    with torch.no_grad():
        guess = torch.cat([model(part).argmax(1) for part in images.split(16)])
    pairs = [(guess == kind, masks == kind) for kind in range(KINDS)]
    return float(torch.stack([(a & b).sum() / (a | b).sum().clamp_min(1) for a, b in pairs]).mean())


def segment(
    batch: int, arm: str, lr: float, seed: int, test: bool, steps: int = STEPS, scenes_seen: int = 50
) -> dict[str, Any]:
    """Train one U-Net; what it reaches on validation scenes and, if asked, on test scenes."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model: nn.Module = UNet("instance" if arm == "instance" else "group", KINDS)
    if arm == "nf":  # from either U-Net it makes the same one
        model = nfnets.convert(model, scenes("train", range(64))[0], norms="all", batch_size=batch)
    groups = nfnets.param_groups(model, lr=lr, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    if arm == "nf":
        nfnets.attach(optimizer, model, batch_size=batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        first = 1_000_000 * (seed + 1) + batch * step
        x, y = scenes("train", range(first, first + batch))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    found: dict[str, Any] = {"status": "done"}
    for split in ("val", "test") if test else ("val",):
        x, y = scenes(split, range(scenes_seen))
        found[f"{split}_accuracy"] = mean_iou(model, x, y)
        if split == "test":
            found["shifted_accuracy"] = mean_iou(model, 0.5 * x + 0.3, y)
    return found


def classified(found: dict[str, dict[str, Any]]) -> str:
    """Test accuracy of the classifiers, and the paired difference from layer norm, as Markdown."""
    lines = []
    for net, results in found.items():
        rates = {chosen["arm"]: chosen["lr"] for chosen in results["chosen"]}
        names = [arm["name"] for arm in results["experiment"]["arms"]]
        first = accuracies(results, names[0], BATCH)
        for arm in names:
            values = accuracies(results, arm, BATCH)
            against = "–" if arm == names[0] else compared(values, first)
            lines.append([net, arm, f"{rates[arm]:g}", percent(values), against])
    return markdown(["net", "arm", "lr", "test, %", "minus layer norm, points [95 %]"], lines)


def segmented(found: dict[str, dict[str, Any]]) -> str:
    """Mean intersection over union of the U-Nets, as Markdown."""
    lines = []
    for name, results in found.items():
        rates = {chosen["arm"]: chosen["lr"] for chosen in results["chosen"]}
        for arm in results["experiment"]["arms"]:
            cells = []
            for split in ("test", "shifted"):
                values, first = (accuracies(results, each, 0, split) for each in (arm, "group"))
                cells += [percent(values), "–" if arm == "group" else compared(values, first)]
            lines.append([name, arm, f"{rates[arm]:g}", *cells])
    head = [
        "U-Net",
        "arm",
        "lr",
        "test IoU, %",
        "minus group, points [95 %]",
        "shifted IoU, %",
        "minus group",
    ]
    return markdown(head, lines)


def main() -> None:
    parser = arguments(__doc__, "runs/any-norm")
    known = (*CLASSIFIERS, *UNETS)
    parser.add_argument("parts", nargs="*", default=known, metavar="PART", help=", ".join(known))
    options = parser.parse_args()
    out: Path = options.out
    nets = [part for part in options.parts if part in CLASSIFIERS]
    unets = [part for part in options.parts if part in UNETS]
    found = {net: sweep(experiment(net), out / net, COMMAND, options.jobs) for net in nets}
    trained = {
        name: search(partial(segment, UNETS[name]), UNET_ARMS, UNET_LRS, out / name, options.jobs)
        for name in unets
    }
    texts = [classified(found)] * bool(found) + [segmented(trained)] * bool(trained)
    conclude(out, COMMAND, __doc__, "\n\n".join(texts))


if __name__ == "__main__":
    main()
