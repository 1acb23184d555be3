"""A plain net of 14 layers without norm layers, by how it starts: ten initializers against BatchNorm and NF + AGC.

    python -m experiments.plain_init [--data digits] [--steps 160] [--out runs/plain-init]

13 convolutions of 16 channels, a max pool in the middle, a linear head on the pooled map; no shortcut. Every arm
searches three learning rates on validation images with a tuning seed, then runs with paired seeds: the same images in
the same order, the same number of steps, SGD with momentum 0.9 and a cosine schedule. Gradients are clipped to norm 1,
but for BatchNorm (not clipped) and NF (by AGC). About 5 minutes on one core.
Interrupted, the same command goes on.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.common import accuracies, arguments, compared, conclude, markdown, percent, search
from experiments.nets import plain
from nfnets import attach, convert, param_groups
from nfnets.init import initialize
from nfnets.train import RunConfig
from nfnets.train.data import load
from nfnets.train.keyed import seeded

BATCH, CLASSES = 32, 10
LRS = (0.02, 0.06, 0.2)
COMMAND = "python -m experiments.plain_init"
STARTS: dict[str, dict[str, Any]] = {
    "he": {},
    "orthogonal": {},
    "lsuv": {},
    "autoinit": {},
    "tat": {"eta": 0.85},  # 0.9 is out of reach for 13 ReLUs
    "dks": {},
    "selu": {},
    "weight_norm": {},
    "zero": {},
}
ARMS = ("bn", "nf+agc", *STARTS)


def build(arm: str, depth: int, channels: int, images: Tensor) -> nn.Module:
    """An arm's model; `images` is its first batch, which some starts read."""
    model = plain(CLASSES, channels, depth)
    if arm == "bn":
        return model
    if arm == "nf+agc":
        return convert(model, images, method="nf", batch_size=BATCH)
    for name, module in list(model.named_children()):
        if isinstance(module, nn.BatchNorm2d):
            setattr(model, name, nn.Identity())
        elif isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_channels))
    initialize(model, images, method=arm, measure=False, **STARTS[arm])
    return model


def run(
    arm: str, lr: float, seed: int, test: bool, data: str, images: int | None, steps: int, depth: int
) -> dict[str, Any]:
    """Train one arm; a loss that is not finite ends it."""
    began = time.process_time()
    config = RunConfig.create(
        model="bn_resnet8_cifar", data=data, train_limit=images, batch_size=BATCH, threads=1, augment="none"
    )
    loaded = load(config)
    x, y = _normal(loaded.train.images, loaded), loaded.train.labels.long()
    order = torch.Generator().manual_seed(seed)
    with seeded(seed, "init"):
        model = build(arm, depth, loaded.channels, x[torch.randperm(len(x), generator=order)[:BATCH]])
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=5e-4, lr=lr), lr=lr, momentum=0.9)
    if arm == "nf+agc":
        attach(optimizer, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * t / steps)) / 2)
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = [b for b in torch.randperm(len(x), generator=order).split(BATCH) if len(b) == BATCH]
        batch = batches.pop()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        if not bool(torch.isfinite(loss)):
            return {"status": "diverged", "val_accuracy": 1 / CLASSES, "test_accuracy": 1 / CLASSES}
        optimizer.zero_grad()
        loss.backward()
        if arm not in ("bn", "nf+agc"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    found = {"status": "done", "val_accuracy": _accuracy(model, loaded, loaded.val)}
    if test:
        found["test_accuracy"] = _accuracy(model, loaded, loaded.test)
    return found | {"seconds": round(time.process_time() - began, 1)}


def _normal(images: Tensor, loaded: Any) -> Tensor:
    mean, std = (torch.as_tensor(t).reshape(1, -1, 1, 1) for t in (loaded.mean, loaded.std))
    values = images.float()
    return ((values / 255 if images.dtype == torch.uint8 else values) - mean) / std


@torch.no_grad()
def _accuracy(model: nn.Module, loaded: Any, split: Any) -> float:
    model.eval()
    hits = [
        (model(_normal(x, loaded)).argmax(1) == y).float()
        for x, y in zip(split.images.split(500), split.labels.split(500), strict=True)
    ]
    return float(torch.cat(hits).mean())


def table(results: dict[str, Any]) -> str:
    """Test accuracy and the paired differences to BatchNorm and to He, as Markdown."""
    rates = {c["arm"]: c["lr"] for c in results["chosen"]}
    bn, he = (accuracies(results, arm, 0) for arm in ("bn", "he"))
    body = []
    for arm in ARMS:
        values = accuracies(results, arm, 0)
        against = ["–" if arm == name else compared(values, v) for name, v in (("bn", bn), ("he", he))]
        body.append([arm, f"{rates[arm]:g}", percent(values), *against])
    return markdown(["arm", "lr", "test, %", "minus BN, points [95 %]", "minus He, points [95 %]"], body)


def main() -> None:
    parser = arguments(__doc__, "runs/plain-init")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, help="training and validation images; all without it")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--depth", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("data", "images", "steps", "depth")}
    seeds = tuple(range(options.seeds))
    found = search(
        partial(run, **settings), ARMS, LRS, Path(options.out), options.jobs, seeds, {"settings": settings}
    )
    conclude(options.out, COMMAND, __doc__, table(found))


if __name__ == "__main__":
    main()
