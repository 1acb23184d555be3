"""What the harness adds to a training step: data, loop and start, each beside the same work without it or timm's."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.timing import paired
from nfnets.train.augment.pipeline import augmenter
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.hardware import cores
from nfnets.train.loop.arm import arm_model
from nfnets.train.loop.order import Batches
from nfnets.train.loop.processes import Processes
from nfnets.train.loop.trainer import Trainer

FIRST_STEP_SECONDS = 10.0
SMALL = {"rounds": 1, "batch": 4, "size": 32, "steps": 1, "images": 40, "starts": 1, "of_resnet20": 4}
_START = """
import os, sys
from pathlib import Path
from nfnets.train.loop import engine
from nfnets.train.config import RunConfig
config = RunConfig.create(model="bn_resnet20_cifar", data="digits", checkpoint_every=1)
engine.run(config, Path(sys.argv[1]), on_step=lambda row: os._exit(0))
os._exit(1)
"""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def binary_cifar(folder: Path, count: int) -> None:
    """CIFAR-10's binary files with so many random images each."""
    draw = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        rows = draw.integers(0, 256, (count, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(count) % 10
        (folder / name).write_bytes(rows.tobytes())


def photographs(folder: Path, count: int) -> None:
    """Class folders of JPEG files that decode about as photographs of their size do."""
    draw = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 40)):
        for index in range(number):
            place = folder / split / f"class{index % 10}"
            place.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{index}.jpg", quality=90)


def of(config: RunConfig) -> tuple[Batches, Trainer]:
    """What `engine.run` trains with."""
    data = load(config, config.device)
    batches = Batches(data, config, augmenter(data, config))
    model = arm_model(config, data).to(config.device)
    processes = Processes(torch.device(config.device))
    return batches, Trainer(model, config, batches.per_epoch, data.num_classes, processes)


def rates(ours: Callable[[], Any], peer: Callable[[], Any], per: int, rounds: int) -> dict[str, float]:
    """Milliseconds per unit of work, and the ratio of the rates, ours over the peer's."""
    times = paired(ours, peer, rounds, warmup=1)
    return {"ours_ms": times.ours_ms / per, "peer_ms": times.peer_ms / per, "ratio": 1 / times.ratio}


def resident(folder: Path, batch: int, rounds: int) -> dict[str, Any]:
    """Steps with their augmented batches, and steps on one batch that is there already."""
    binary_cifar(folder, 12 * batch)
    config = RunConfig.create(
        model="bn_resnet20_cifar",
        data="cifar10",
        data_dir=folder,
        verify_data=False,
        augment="crop-flip",
        batch_size=batch,
        device=device(),
        epochs=1000,
    )
    batches, trainer = of(config)
    fixed = batches.first()
    steps = min(
        batches.per_chunk, batches.per_epoch
    )  # batches are augmented so many at once: all of them are used

    def piped() -> None:
        for one in batches.from_step(0, steps):
            trainer.step(one)

    def alone() -> None:
        for _ in range(steps):
            trainer.step(fixed)

    what = f"resident pipeline's step rate, ResNet-20, batch {batch}"
    return {"what": what, "peer": "the model alone", "target": "≥ 0.9×"} | rates(piped, alone, steps, rounds)


def streamed(folder: Path, size: int, batch: int) -> RunConfig:
    return RunConfig.create(
        model="timm:resnet18",
        data="imagenet",
        data_dir=folder,
        image_size=size,
        batch_size=batch,
        validation_fraction=0.05,
        augment="crop-flip",
        momentum=0.9,
        weight_decay=5e-5,
        workers=min(4, cores()),
        device=device(),
        epochs=1000,
    )


def timm_loader(config: RunConfig) -> Any:
    """timm's loader with the same crops, flips, normalization and number of workers."""
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(config.data_dir), split="train", is_training=True)
    return create_loader(
        dataset,
        input_size=(3, config.image_size, config.image_size),
        batch_size=config.batch_size,
        is_training=True,
        no_aug=False,
        scale=(config.min_crop, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        color_jitter=None,
        interpolation=config.interpolation,
        num_workers=config.workers or 0,
        persistent_workers=False,
        use_prefetcher=config.device == "cuda",
        device=torch.device(config.device),
    )


def read(config: RunConfig, steps: int, rounds: int) -> dict[str, Any]:
    """So many batches from files, the workers' start included, on both sides."""
    data = load(config, config.device)
    batches = Batches(data, config, augmenter(data, config))

    def ours() -> None:
        for _ in batches.from_step(0, steps):
            pass

    def peer() -> None:
        for step, _ in enumerate(timm_loader(config), 1):
            if step == steps:
                break

    what = f"image folder's rate, {config.image_size} pixels, {config.workers} workers"
    return {"what": what, "peer": "timm's loader", "target": "≥ 1.0×"} | rates(ours, peer, steps, rounds)


def loop(config: RunConfig, steps: int, rounds: int) -> dict[str, Any]:
    """Our loop beside one written as timm's train.py is, from timm's own pieces, on the same files."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.utils.metrics import AverageMeter

    batches, trainer = of(config)

    def ours() -> None:
        torch.stack([trainer.step(one)[0] for one in batches.from_step(0, steps)]).tolist()

    model = arm_model(config, batches.data).to(config.device)
    optimizer = create_optimizer_v2(
        model, opt="sgd", lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
    )
    scheduler = CosineLRScheduler(optimizer, t_initial=1000 * steps, t_in_epochs=False)
    loss_function = nn.CrossEntropyLoss()

    def peer() -> None:
        losses = AverageMeter()
        for step, (images, labels) in enumerate(timm_loader(config), 1):
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), len(images))
            scheduler.step_update(num_updates=step, metric=losses.avg)
            if step == steps:
                break

    what = f"training's rate, timm's ResNet-18, {config.image_size} pixels, batch {config.batch_size}"
    return {"what": what, "peer": "timm's train.py loop", "target": "≥ 1.0×"} | rates(
        ours, peer, steps, rounds
    )


def start(rounds: int) -> dict[str, Any]:
    """From the interpreter's start to the first step's line in the log."""
    times = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", _START, str(Path(folder) / "run")], check=True)
            times.append(1e3 * (time.perf_counter() - begun))
    took, allowed = sorted(times)[len(times) // 2], 1e3 * FIRST_STEP_SECONDS
    row = {"what": "start to first step", "ours_ms": took, "peer": "ten seconds", "peer_ms": allowed}
    return row | {"ratio": took / allowed, "target": "≤ 1.0×"}


def rows(
    rounds: int = 5,
    batch: int = 32,
    size: int = 96,
    steps: int = 4,
    images: int = 400,
    starts: int = 3,
    of_resnet20: int = 64,
) -> list[dict[str, Any]]:
    """The harness's rows of the speed table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder / "photographs", images)
        (folder / "cifar").mkdir()
        config = streamed(folder / "photographs", size, batch)
        few = min(images, int(images * 0.95)) // batch
        return [
            resident(folder / "cifar", of_resnet20, rounds),
            read(config, few, rounds),
            loop(config, steps, rounds),
            start(starts),
        ]
