"""A U-Net on a large image, tile by tile: seams where group norm sees each tile's own statistics, none without it.

python examples/tiled_inference.py --smoke
python examples/tiled_inference.py --steps 100 --out tiles.png

The picture shows what each net says of the image as a whole, what it says tile by tile, and the difference.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from shapes import CLASSES, scene
from torch import Tensor, nn

import nfnets
from nfnets import verify
from nfnets.tiles import tiled

TILE, HALO = 32, 32
"""Multiples of the net's stride, 4; the halo covers its receptive field's radius, 22."""


class UNet(nn.Module):
    """Three levels, each of two convolutions with group norm."""

    def __init__(self, widths: Sequence[int] = (8, 16, 32)):
        super().__init__()

        def level(before: int, after: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for channels in (before, after):
                layers += [
                    nn.Conv2d(channels, after, 3, padding=1, bias=False),
                    nn.GroupNorm(4, after),
                    nn.ReLU(),
                ]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(level(a, b) for a, b in pairwise((3, *widths)))
        self.up = nn.ModuleList(level(a + b, b) for a, b in pairwise(widths[::-1]))
        self.head = nn.Conv2d(widths[0], len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        kept.pop()
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        return self.head(x)


def batch_of(size: int, seeds: range) -> tuple[Tensor, Tensor]:
    """Images in [−1, 1] and masks of labels."""
    scenes = [scene(size, seed) for seed in seeds]
    return torch.stack([s[0] for s in scenes]) * 2 - 1, torch.stack([s[2] for s in scenes])


def train(model: nn.Module, steps: int, clip: bool, batch: int = 2) -> nn.Module:
    """Some steps on scenes of 64 pixels."""
    optimizer = torch.optim.SGD(
        nfnets.param_groups(model, lr=0.02, weight_decay=1e-4), momentum=0.9, nesterov=True
    )
    if clip:
        nfnets.attach(optimizer, model, batch_size=batch)
    for step in range(steps):
        x, y = batch_of(64, range(1000 + batch * step, 1000 + batch * (step + 1)))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def draw(image: Tensor, found: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """For each net: the whole's background probability, the tiles', the difference."""
    figure = Figure(figsize=(12, 3.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 4, squeeze=False)
    for row, (name, (whole, parts)) in zip(axes, found.items(), strict=True):
        row[0].imshow(((image[0].permute(1, 2, 0) + 1) / 2).numpy())
        for axis, value in zip(row[1:3], (whole, parts), strict=True):
            axis.imshow(value[0].softmax(0)[0].numpy(), vmin=0, vmax=1, cmap="gray")
        difference = (whole - parts)[0].abs().amax(0)
        row[3].imshow(difference.numpy(), vmin=0, vmax=max(1e-3, float(difference.max())), cmap="magma")
        for axis, title in zip(
            row,
            ("image", f"{name}, whole", f"{name}, tiles", f"difference, at most {difference.max():.1e}"),
            strict=True,
        ):
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two steps: does everything work here?")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("tiles.png"))
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    normed = UNet()
    free = nfnets.convert(normed, batch_of(64, range(32))[0], norms="group", batch_size=2)
    image, _ = batch_of(128 if args.smoke else 256, range(7, 8))
    nets = {"group norm": normed, "nf": free}
    found, worst = {}, {}
    for name, model in nets.items():
        train(model, 2 if args.smoke else args.steps, clip=model is free)
        verdict = verify.tile_independence(model, image, TILE, HALO)
        print(f"{name}: {verdict}")
        with torch.no_grad():
            found[name] = (model(image), tiled(model, image, TILE, HALO))
        worst[name] = verdict.worst
    draw(image, found, args.out)
    print(f"wrote {args.out}")
    return worst


if __name__ == "__main__":
    main()
