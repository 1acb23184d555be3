"""Scaled-standardized layers: evaluation against the baked net, training against the BatchNorm twin and timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import nfnets
from benchmarks.timing import paired, peak_mib

SIZE = 224
SMALL = {"rounds": 2, "steps": 1, "batch": 2, "size": 64}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def resnet50(kind: str) -> nn.Module:
    """'bn' torchvision's, 'nf' the same converted, 'timm' timm's NF-ResNet-50 (its own block, similar work)."""
    torch.manual_seed(0)
    if kind == "timm":
        return timm.create_model("nf_resnet50").to(device())
    model: nn.Module = torchvision.models.resnet50()
    if kind == "nf":
        model = nfnets.convert(model, torch.randn(4, 3, 96, 96), method="nf")
    return model.to(device())


def training_step(kind: str, batch: int, size: int) -> Callable[[], Tensor]:
    """One step of SGD with momentum on a fixed batch."""
    model = resnet50(kind).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x, y = (
        torch.randn(batch, 3, size, size, device=device()),
        torch.zeros(batch, dtype=torch.long, device=device()),
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def evaluation(model: nn.Module, batch: int, size: int) -> Callable[[], Tensor]:
    x = torch.randn(batch, 3, size, size, device=device())
    return torch.inference_mode()(lambda: model(x))


def rows(rounds: int = 15, steps: int = 5, batch: int = 8, size: int = SIZE) -> list[dict[str, Any]]:
    """The layer rows of the speed table."""
    table: list[dict[str, Any]] = []

    def add(what: str, peer: str, numbers: tuple[float, float, float], target: str, unit: str = "ms") -> None:
        ours, theirs, ratio = numbers
        table.append(
            {"what": what, "ours_ms": ours, "peer": peer, "peer_ms": theirs, "ratio": ratio, "target": target}
            | ({} if unit == "ms" else {"unit": unit})
        )

    nf, bn, timms = (resnet50(kind).eval() for kind in ("nf", "bn", "timm"))
    baked = nfnets.bake(nf)
    for count in (1, batch):
        what, times = (
            f"evaluation forward, NF-ResNet-50, batch {count}",
            rounds if count == 1 else rounds // 2,
        )
        ours = evaluation(nf, count, size)
        add(what, "the same net baked", paired(ours, evaluation(baked, count, size), times), "≤ 1.05×")
        add(what, "its BatchNorm twin", paired(ours, evaluation(bn, count, size), times), "")
        add(what, "timm nf_resnet50", paired(ours, evaluation(timms, count, size), times), "")
    del nf, bn, timms, baked
    ours = training_step("nf", batch, size)
    for peer, name in (("bn", "its BatchNorm twin"), ("timm", "timm nf_resnet50")):
        numbers = paired(ours, training_step(peer, batch, size), steps, warmup=1)
        add(f"training step, NF-ResNet-50, batch {batch}", name, numbers, "≤ 1.00×")
    peaks = [peak_mib(training_step, (kind, batch, size), (kind, 1, size)) for kind in ("nf", "bn")]
    numbers = (peaks[0], peaks[1], peaks[0] / peaks[1])
    add(f"peak memory of that step, batch {batch}", "its BatchNorm twin", numbers, "≤ 1.00×", "MiB")
    return table
