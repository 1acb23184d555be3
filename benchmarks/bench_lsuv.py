"""LSUV: ours in one forward pass against PyPI `lsuv`, a 50-layer net."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.init import lsuv_

TARGET = 20.0
SMALL = {"repeats": 1, "batch": 2, "size": 4}


def plain_net(layers: int = 50, width: int = 32) -> nn.Sequential:
    """A chain of `layers` weight layers; out-of-place ReLUs, which the peer needs to see its own statistics."""
    parts: list[nn.Module] = []
    for index in range(layers - 1):
        parts += [nn.Conv2d(3 if index == 0 else width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def forwards(initialize: Callable[[nn.Module, Tensor], Any], model: nn.Module, x: Tensor) -> int:
    """How many forward passes of the model `initialize` runs."""
    model, count = copy.deepcopy(model), 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    model.register_forward_pre_hook(counted)
    initialize(model, x)
    return count


def rows(repeats: int = 3, batch: int = 32, size: int = 16) -> list[dict[str, Any]]:
    """Both sides in turn on copies of one net, medians of `repeats`."""
    import lsuv

    def peer(model: nn.Module, x: Tensor) -> None:
        lsuv.lsuv_with_singlebatch(model, x, verbose=False, device=x.device)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = plain_net().to(device), torch.randn(batch, 3, size, size, device=device)
    lsuv_(copy.deepcopy(model), x)
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        for name, initialize in (("ours", lsuv_), ("peer", peer)):
            copied = copy.deepcopy(model)
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            initialize(copied, x)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    ours, theirs = (statistics.median(times[name]) for name in ("ours", "peer"))
    counts = f"{forwards(lsuv_, model, x)} forward, peer {forwards(peer, model, x)}"
    return [
        {
            "what": f"LSUV, 50 layers, batch {batch} of {size}×{size} ({counts})",
            "ours_ms": ours,
            "peer": "PyPI lsuv",
            "peer_ms": theirs,
            "ratio": theirs / ours,
            "target": f"≥ {TARGET:.0f}× faster, exactly one forward",
        }
    ]


if __name__ == "__main__":
    for row in rows():
        print(row)
