"""Planning and converting ResNet-50, in plain forward passes of it on the same batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torchvision

import nfnets
from benchmarks.timing import paired

METHODS = ("nf", "fixed_variance", "fold", "lsuv", "gn", "ws_gn", "fixup", "skipinit")
TARGET = "≤ 3 forward passes"
SMALL = {"rounds": 1, "batch": 2, "size": 64, "methods": METHODS[:1]}


def rows(
    rounds: int = 3, batch: int = 16, size: int = 224, methods: tuple[str, ...] = METHODS
) -> list[dict[str, Any]]:
    """`convert`, which plans too, against one pass in training mode without gradients, by every method."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.resnet50().to(device)
    x = torch.randn(batch, 3, size, size, device=device)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    found = []
    for method in methods:
        options = {"channelwise": True} if method == "nf" else {}  # as it does on 32 samples and more
        ours = partial(nfnets.convert, model, x, method=method, **options)
        timed = paired(ours, forward, rounds=rounds, warmup=1)
        found.append(
            {
                "what": f"`convert` by {method}, ResNet-50, batch {batch} of {size}×{size}",
                "ours_ms": timed.ours_ms,
                "peer": "one forward pass",
                "peer_ms": timed.peer_ms,
                "ratio": timed.ratio,
                "target": TARGET,
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
