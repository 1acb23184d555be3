"""Tiny batches: a training step from forward to optimizer step, against the BatchNorm twin and the same net baked.

Processor time of one thread, all in turn, so that a busy machine counts for all alike; a ratio is the median of the
rounds'. "Accumulated" is four batches a step inside `nfnets.accumulating`. AGC's row is its own time, where nothing
clips, over that of the optimizer step which it precedes.
"""

from __future__ import annotations

import copy
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import nfnets
from nfnets.agc import attach_agc

# Name, image size, batches, rounds.
NETS: dict[str, tuple[str, int, tuple[int, ...], int]] = {
    "bn_resnet20_cifar": ("ResNet-20", 32, (1, 2, 4), 40),
    "mobilenet_v2": ("MobileNetV2 ×0.5", 64, (2, 4), 30),  # BatchNorm refuses one value a channel
    "resnet50": ("ResNet-50", 96, (1, 2, 4), 9),
}
SMALL = {"nets": {"bn_resnet20_cifar": ("ResNet-20", 16, (2,), 1)}}
NEVER = 1e6  # λ
MICRO = 4


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mobilenet_v2":
        return torchvision.models.mobilenet_v2(width_mult=0.5, num_classes=10)
    return torchvision.models.resnet50(num_classes=10) if name == "resnet50" else nfnets.create_model(name)


class Run:
    """A net with its optimizer; milliseconds of a step in parts."""

    def __init__(self, model: nn.Module, clipped: bool = False) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        self.plain = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        self.handle = attach_agc(self.optimizer, model, NEVER) if clipped else None

    def step(self, batch: int, size: int, passes: int = 1) -> tuple[float, float]:
        """Forward and backward, and the optimizer's step."""
        x, y = torch.randn(batch, 3, size, size), torch.zeros(batch, dtype=torch.long)
        self.optimizer.zero_grad()
        begin = time.process_time()
        with nfnets.accumulating(self.model) if self.handle and passes > 1 else nullcontext():
            for _ in range(passes):
                F.cross_entropy(self.model(x), y).backward()
        middle = time.process_time()
        self.optimizer.step()
        return 1e3 * (middle - begin), 1e3 * (time.process_time() - middle)

    def agc(self) -> tuple[float, float]:
        """AGC alone, and the optimizer's step without it."""
        assert self.handle is not None
        begin = time.process_time()
        self.handle._change()
        middle = time.process_time()
        self.plain.step()
        return 1e3 * (middle - begin), 1e3 * (time.process_time() - middle)


def rows(nets: dict[str, tuple[str, int, tuple[int, ...], int]] = NETS) -> list[dict[str, Any]]:
    """Rows for every net and batch: to BatchNorm, to the baked net, accumulated, AGC."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for name, (label, *rest) in nets.items() for row in _rows_of(name, label, *rest)]
    finally:
        torch.set_num_threads(threads)


def _rows_of(name: str, label: str, size: int, batches: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    bn = network(name)
    nf = nfnets.convert(bn, torch.randn(32, 3, size, size), method="nf")
    runs = {"ours": Run(nf, clipped=True), "bn": Run(bn), "bare": Run(copy.deepcopy(nfnets.bake(nf)))}
    found = []

    def add(what: str, peer: str, ours: list[float], theirs: list[float], target: str) -> None:
        found.append(
            {
                "what": f"{what}, {label}",
                "ours_ms": statistics.median(ours),
                "peer": peer,
                "peer_ms": statistics.median(theirs),
                "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
                "target": target,
            }
        )

    def taken(batch: int, passes: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {key: [] for key in runs}
        for index in range(rounds + 1):
            for key in sorted(runs, reverse=bool(index % 2)):
                spent = sum(runs[key].step(batch, size, passes))
                times[key] += [spent] if index else []
        return times

    for batch in batches:
        times = taken(batch, 1)
        what = f"step, batch {batch}"
        add(what, "its BatchNorm twin", times["ours"], times["bn"], "≤ 1.00×")
        target = "≤ 1.10×" if label == "ResNet-50" and batch == 4 else ""
        add(what, "the same net baked", times["ours"], times["bare"], target)
    times = taken(batches[-1], MICRO)
    what = f"step, {MICRO} × batch {batches[-1]} accumulated"
    add(what, "its BatchNorm twin", times["ours"], times["bn"], "≤ 1.00×")
    pairs = [runs["ours"].agc() for _ in range(rounds + 1)][1:]
    add("AGC, nothing clips", "the optimizer's step", [a for a, _ in pairs], [b for _, b in pairs], "≤ 0.25×")
    return found


if __name__ == "__main__":
    for row in rows():
        print(
            "{what:44} {ours_ms:8.2f} ms   {peer:22} {peer_ms:8.2f} ms   {ratio:5.2f}  {target}".format(
                **row
            ),
            flush=True,
        )
