"""Images that changed after training: BatchNorm, its statistics taken from the test batch, and nets without statistics.

    python -m experiments.shift [--data digits] [--out runs/shift] [--jobs 2]

ResNet-8 on 2,000 images of Fashion-MNIST for 4 epochs, or on 1,294 digits of 8×8 pixels for 8, by SGD at batch 64:
BatchNorm, GroupNorm, `nf`, and BatchNorm folded before the last epoch. Two learning rates on validation data with a
tuning seed, then three seeds. Each net then sees 180 test images under five changes at five severities: Gaussian
noise, contrast and brightness by ImageNet-C's formulas and constants, Gaussian blur by CIFAR-10-C's, as it is
measured in pixels (arXiv 1903.12261); rotation by 10 to 50 degrees, which is ours. BatchNorm's net is evaluated by
its running statistics, by those of the test batch (1, 4 and 64 images), and by a mixture with a tenth of the batch's
(α-BN); test batches hold images of one change and severity. Nothing is chosen on changed images. About 15 core
minutes, digits 4. Interrupted, the same command goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

from experiments.common import (
    COLORS,
    MARKERS,
    arguments,
    compared,
    conclude,
    markdown,
    panels,
    percent,
    percent_axis,
    save,
    search,
)
from experiments.federated import Part, accuracy
from nfnets.alpha_bn import batch_statistics
from nfnets.attached import attach
from nfnets.convert import convert
from nfnets.models import create_model
from nfnets.parameter_groups import param_groups
from nfnets.train.config import RunConfig
from nfnets.train.data import load

COMMAND = "python -m experiments.shift"
ARMS = ("bn", "gn", "nf", "fold")
LRS = (0.05, 0.15)
TESTED, BATCH = 180, 64
DATA = {"fashion-mnist": (2000, 4), "digits": (1294, 8)}
"""Training images and epochs."""
BY_BATCH = {
    "bn, test batch of 1": (1.0, 1),
    "bn, test batch of 4": (1.0, 4),
    "bn, test batch of 64": (1.0, 64),
    "bn, α-BN, 0.1 of a batch of 4": (0.1, 4),
    "bn, α-BN, 0.1 of a batch of 64": (0.1, 64),
}
"""Ways to evaluate BatchNorm's net: the share of the batch's statistics, and the batch size."""


def noise(x: Tensor, severity: int) -> Tensor:
    """Gaussian noise of standard deviation 0.08 to 0.38, the same for every net."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(severity))
    return (x + (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] * drawn).clamp(0, 1)


def blur(x: Tensor, severity: int) -> Tensor:
    """A Gaussian of standard deviation 0.4 to 1 pixels."""
    return transforms.gaussian_blur(x, [9, 9], [(0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]] * 2)


def contrast(x: Tensor, severity: int) -> Tensor:
    """Nearer to each image's mean."""
    mean = x.mean((2, 3), keepdim=True)
    return ((x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + mean).clamp(0, 1)


def brightness(x: Tensor, severity: int) -> Tensor:
    """Brighter by 0.1 to 0.5; the value of a gray image is the image."""
    return (x + 0.1 * severity).clamp(0, 1)


def rotation(x: Tensor, severity: int) -> Tensor:
    """Turned by 10 to 50 degrees, black where nothing was."""
    return transforms.rotate(x, 10.0 * severity, transforms.InterpolationMode.BILINEAR)


CHANGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    f.__name__: f for f in (noise, blur, contrast, brightness, rotation)
}


def parts(name: str, images: int) -> tuple[Part, Part, Part, Callable[[Tensor], Tensor]]:
    """Training, validation and test images from 0 to 1 with their labels, and what normalizes them."""
    data = load(RunConfig.create(data=name, train_limit=round(images / 0.9)))
    own = [(split.images.float() / 255, split.labels) for split in (data.train, data.val, data.test)]  # type: ignore[union-attr]
    mean, std = data.mean[0], data.std[0]
    return own[0], own[1], own[2], lambda x: (x - mean) / std


def epochs(model: nn.Module, part: Part, lr: float, count: int, method: str, seed: int) -> None:
    """Train by SGD with momentum and a cosine, or a folded net by AdamW; clipped as the method needs."""
    steps = count * (len(part[1]) // BATCH)
    groups = param_groups(model, lr, 5e-4)
    kind = partial(torch.optim.SGD, momentum=0.9) if method != "fold" else torch.optim.AdamW
    optimizer = kind(groups)
    attach(optimizer, model, BATCH, method=method, verbose=False)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(count):
        order = torch.randperm(len(part[1]), generator=generator)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(part[0][rows]), part[1][rows])
            if not math.isfinite(loss.item()):
                raise FloatingPointError("the loss is not finite")
            loss.backward()
            optimizer.step()
            schedule.step()


def trained(arm: str, train: Part, lr: float, seed: int, count: int) -> nn.Module:
    """An arm's net. `fold` is BatchNorm's, folded before its last epoch, which goes by the folded net's own recipe."""
    torch.manual_seed(seed)
    model = create_model("bn_resnet8_cifar", in_chans=1, num_classes=10)
    if arm in ("bn", "fold"):
        epochs(model, train, lr, count - (arm == "fold"), "bn", seed)
    if arm != "bn":
        model = convert(model, train[0][:BATCH], method=arm, batch_size=BATCH)
        rate, left = (0.001 * (BATCH / 4) ** 0.5, 1) if arm == "fold" else (lr, count)
        epochs(model, train, rate, left, arm, seed)
    return model.eval()


def in_batches(model: nn.Module, part: Part, share: float | None, size: int) -> float:
    """Accuracy, by batches of so many images; with a share of their statistics."""
    right = 0
    with torch.no_grad(), nullcontext() if share is None else batch_statistics(model, share):
        for x, y in zip(part[0].split(size), part[1].split(size), strict=True):
            right += int((model(x).argmax(1) == y).sum())
    return right / len(part[1])


def shifted(arm: str, lr: float, seed: int, tested: bool, data: str = "fashion-mnist") -> dict[str, Any]:
    """One run: its accuracy on images as they are, and on changed ones by kind, severity and way to evaluate."""
    torch.set_num_threads(1)
    images, count = DATA[data]
    train, val, test, ready = parts(data, images)
    try:
        model = trained(arm, (ready(train[0]), train[1]), lr, seed, count)
    except FloatingPointError:
        return {"status": "diverged", "val_accuracy": 0.0, "test_accuracy": None}
    found: dict[str, Any] = {"status": "done", "val_accuracy": accuracy(model, (ready(val[0]), val[1]))}
    ways = {arm: (None, 250)} | (BY_BATCH if arm == "bn" else {})
    sets = {"clean": [test[0][:TESTED]]}
    sets |= {name: [f(test[0][:TESTED], s) for s in range(1, 6)] for name, f in CHANGES.items()}
    if tested:
        found["shift"] = {
            way: {
                name: [in_batches(model, (ready(x), test[1][:TESTED]), *how) for x in severities]
                for name, severities in sets.items()
            }
            for way, how in ways.items()
        }
    found["test_accuracy"] = found["shift"][arm]["clean"][0] if tested else None
    return found


def by_way(results: dict[str, Any]) -> dict[str, dict[str, list[list[float]]]]:
    """Accuracies by way to evaluate and change: for each seed one for each severity."""
    finals = sorted((r for r in results["runs"] if r["final"]), key=lambda r: r["seed"])
    found: dict[str, dict[str, list[list[float]]]] = {}
    for run in finals:
        for way, changes in run.get("shift", {}).items():
            for name, row in changes.items():
                found.setdefault(way, {}).setdefault(name, []).append(row)
    return found


def table(results: dict[str, Any]) -> str:
    """Test accuracy as it was and under each change (mean over severities), and the difference to BatchNorm's mean."""

    def means(rows: list[list[float]]) -> list[float]:
        return [sum(row) / len(row) for row in rows]

    found, body = by_way(results), []
    changed = {
        way: [sum(seed) / len(seed) for seed in zip(*(means(rows[n]) for n in CHANGES), strict=True)]
        for way, rows in found.items()
    }
    for way, rows in found.items():
        each = [percent(means(rows[name])) for name in ("clean", *CHANGES)]
        body.append(
            [way, *each, percent(changed[way]), "–" if way == "bn" else compared(changed[way], changed["bn"])]
        )
    head = ["net, evaluated", "as it was", *CHANGES, "all changes", "minus `bn`, points [95 %]"]
    return markdown(head, body)


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over severity, a panel for each change, a line for each net and way to evaluate it."""
    figure, axes = panels(len(CHANGES), width=3.0 * len(CHANGES) + 2, height=3.6, sharey=True)
    for number, (way, rows) in enumerate(by_way(results).items()):
        for axis, name in zip(axes, CHANGES, strict=True):
            clean = sum(row[0] for row in rows["clean"]) / len(rows["clean"])
            line = [clean, *(sum(s) / len(s) for s in zip(*rows[name], strict=True))]
            style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "ms": 4}
            axis.plot(range(6), line, ls="--" if number >= len(COLORS) else "-", lw=1.4, label=way, **style)
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("severity")
    percent_axis(axes[0], "test accuracy, mean of seeds")
    axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def main() -> None:
    parser = arguments(__doc__, "runs/shift")
    parser.add_argument("--data", choices=DATA, default="fashion-mnist")
    options = parser.parse_args()
    run = partial(shifted, data=options.data)
    about = {"data_set": options.data, "tested": TESTED}
    results = search(run, ARMS, LRS, options.out, options.jobs, about=about)
    draw(results, options.out / "shift.png")
    conclude(options.out, f"{COMMAND} --data {options.data}", __doc__, table(results))


if __name__ == "__main__":
    main()
