"""Planning and converting ResNet-50, in plain forward passes of it on the same batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torchvision

import nfnets
from benchmarks.timing import paired

METHODS = ("nf", "fixed_variance", "fold", "lsuv", "gn", "ws_gn", "fixup", "skipinit")
LITTLE = ("nf", "fold")
TARGET = "≤ 3 forward passes"
SMALL = {"rounds": 1, "batch": 2, "size": 64, "methods": METHODS[:1], "little": 32}


def rows(
    rounds: int = 3, batch: int = 16, size: int = 224, methods: tuple[str, ...] = METHODS, little: int = 64
) -> list[dict[str, Any]]:
    """`convert`, which plans too, against one pass in training mode without gradients, by every method; by `nf` and
    `fold` also on images of `little` pixels, where what costs the same for every image is most of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.resnet50().to(device)
    found = []
    for method, pixels in [*((each, size) for each in methods), *((each, little) for each in LITTLE)]:
        x = torch.randn(batch, 3, pixels, pixels, device=device)

        def forward(x: torch.Tensor = x) -> None:
            with torch.no_grad():
                model(x)

        options = {"channelwise": True} if method == "nf" else {}  # as it does on 32 samples and more
        ours = partial(nfnets.convert, model, x, method=method, **options)
        timed = paired(ours, forward, rounds=rounds, warmup=1)
        found.append(
            {
                "what": f"`convert` by {method}, ResNet-50, batch {batch} of {pixels}×{pixels}",
                "ours_ms": timed.ours_ms,
                "peer": "one forward pass",
                "peer_ms": timed.peer_ms,
                "ratio": timed.ratio,
                "target": TARGET if pixels == size else "",
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
