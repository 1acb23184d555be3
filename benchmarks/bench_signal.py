"""What looking costs: ResNet-50 under the probe's default statistics beside the same passes without it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import nfnets
from benchmarks.timing import paired, peak_mib
from nfnets.models import create_model

SIZE = 224
SMALL = {
    "rounds": 1,
    "batch": 2,
    "size": 64,
    "smaller": ((2, 48, "≤ 1.3×"),),
    "profiled": (2, 48),
    "images": 4,
}
# Batch, pixels and target of passes that are so short that looking shows more.
SMALLER = ((16, 128, "≤ 1.3×"), (8, 96, "≤ 1.5×"))


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Runs:
    """Forward passes and training steps of one net, with and without a probe."""

    def __init__(self, batch: int, size: int = SIZE, build: Callable[[], nn.Module] | None = None) -> None:
        torch.manual_seed(0)
        self.model = (build or torchvision.models.resnet50)().to(device()).train()
        self.x = torch.randn(batch, 3, size, size, device=device())
        self.y = torch.zeros(batch, dtype=torch.long, device=device())

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.model(self.x)

    def backward(self) -> None:
        self.model.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()

    def probed(self, run: Callable[[], Any], **options: Any) -> Callable[[], Any]:
        """`run` as a sampled step; the probe stays the same, so that the first pass falls into the warm-up."""
        probe = nfnets.probe(self.model, **options)

        def sampled() -> None:
            with probe:
                run()

        return sampled

    def first(self) -> None:
        """A forward pass under a probe of its own: what a probe finds out once is in it."""
        with nfnets.probe(self.model):
            self.forward()


def forward_of(batch: int, size: int, probe: bool) -> Callable[[], Any]:
    runs = Runs(batch, size)
    return runs.probed(runs.forward) if probe else runs.forward


def backward_of(batch: int, size: int, probe: bool) -> Callable[[], Any]:
    runs = Runs(batch, size)
    return runs.probed(runs.backward, backward=True) if probe else runs.backward


def rows(
    rounds: int = 15,
    batch: int = 16,
    size: int = SIZE,
    every: int = 50,
    smaller: Sequence[tuple[int, int, str]] = SMALLER,
    profiled: tuple[int, int] = (8, 96),
    images: int = 64,
) -> list[dict[str, Any]]:
    """The probe's rows of the speed table; `python -m benchmarks.bench_signal 5` takes 5 rounds."""
    runs, table = Runs(batch, size), []

    def add(
        what: str,
        numbers: tuple[float, float, float],
        target: str,
        peer: str = "without the probe",
        **unit: str,
    ) -> None:
        ours, theirs, ratio = numbers
        row = {"what": what, "ours_ms": ours, "peer": peer, "peer_ms": theirs, "ratio": ratio}
        table.append(row | {"target": target} | unit)

    where = f"ResNet-50, batch {batch}"
    forward = paired(runs.probed(runs.forward), runs.forward, rounds, warmup=3)
    add(f"sampled forward, {where}", forward, "≤ 1.15×")
    both = paired(runs.probed(runs.backward, backward=True), runs.backward, rounds, warmup=3)
    add(f"sampled forward and backward, {where}", both, "≤ 1.3×")
    # One sampled step in `every` costs what it takes longer, spread over all of them. Without the optimizer's step,
    # which costs the same in both: with it the ratio is smaller still.
    spread = both.peer_ms * (1 + (both.ratio - 1) / every)
    add(f"training, every={every}, {where}", (spread, both.peer_ms, spread / both.peer_ms), "≤ 1.01×")
    for count, pixels, target in smaller:
        short = Runs(count, pixels)
        numbers = paired(short.probed(short.forward), short.forward, rounds, warmup=3)
        add(f"sampled forward, ResNet-50, {count} × {pixels} pixels", numbers, target)
    count, pixels = profiled
    short = Runs(count, pixels)
    where = f"ResNet-50, {count} × {pixels} pixels"
    numbers = paired(lambda: nfnets.profile(short.model, short.x), short.forward, rounds)
    add(f"profile, {where}", numbers, "≤ 1.5×", "one forward pass")
    numbers = paired(lambda: nfnets.profile(short.model, short.x, backward=True), short.backward, rounds)
    add(f"profile, backward=True, {where}", numbers, "≤ 1.4×", "forward and backward")
    small = Runs(images, 32, lambda: create_model("bn_resnet20_cifar"))
    numbers = paired(small.first, small.forward, rounds)
    add(f"first sampled pass, ResNet-20, batch {images}", numbers, "≤ 1.5×")
    where = f"ResNet-50, batch {batch}"
    for what, build in (("forward", forward_of), ("forward and backward", backward_of)):
        peaks = [peak_mib(build, (batch, size, probe), (1, 64, probe)) for probe in (True, False)]
        add(f"peak memory, {what}, {where}", (peaks[0], peaks[1], peaks[0] / peaks[1]), "≤ 1.05×", unit="MiB")
    return table


if __name__ == "__main__":
    for row in rows(*map(int, sys.argv[1:])):
        print(
            f"{row['what']}: {row['ours_ms']:.1f} / {row['peer_ms']:.1f} = {row['ratio']:.3f} ({row['target']})"
        )
