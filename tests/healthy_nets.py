"""Healthy reports of every kind, none of which may break a rule: families, methods, inputs, batches, before and after
some training.

    python tests/healthy_nets.py              # what breaks a rule all the same
    python tests/healthy_nets.py --held-out   # of nets that no limit was chosen on
    python tests/healthy_nets.py "300 steps"  # those with this in their names
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from coverage_nets import SMALL
from held_out_nets import FAMILIES, HELD_OUT
from planted_nets import NETS
from torch import Tensor, nn

import nfnets
from nfnets.signal import SignalReport


class Healthy(NamedTuple):
    """A report that should find nothing."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 16
    smooth: bool = False
    method: str | None = None
    steps: int = 0
    seed: int = 0
    rate: float = 0.01


def images(shape: tuple[int, ...], batch: int, smooth: bool) -> Tensor:
    """White noise, or noise blown up from an eighth of the size, as smooth as pictures; unit variance."""
    if not smooth or len(shape) < 3:
        return torch.randn(batch, *shape)
    small = torch.randn(batch, shape[0], *(max(2, s // 8) for s in shape[1:]))
    return F.interpolate(small, size=shape[1:], mode="trilinear" if len(shape) > 3 else "bicubic") * 1.3


def reports_of(case: Healthy) -> list[SignalReport]:
    """A profile; of a training the probe's report and a profile of what it made of the net."""
    torch.manual_seed(case.seed)
    model = case.build()
    x = torch.empty(0) if case.steps else images(case.shape, case.batch, case.smooth)
    if case.method is not None:
        model = nfnets.convert(model, images(case.shape, 32, case.smooth), method=case.method)
    reports = []
    if case.steps:
        trained, x = training(model, case)
        reports.append(trained)
    return [*reports, nfnets.profile(model, x, backward=True)]


def training(model: nn.Module, case: Healthy) -> tuple[SignalReport, Tensor]:
    """On ten images and as much noise, drawn anew at each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=case.rate, momentum=0.9)
    classes, kinds, x = images(case.shape, 10, True), torch.arange(16) % 10, torch.empty(0)
    with nfnets.probe(model.train(), every=case.steps // 3, backward=True, updates=True) as probe:
        for _ in range(case.steps):
            x = (classes[kinds] + images(case.shape, 16, case.smooth)) / 2**0.5
            out = model(x)
            out = out.flatten(2).mean(2) if out.dim() > 2 else out
            loss = F.cross_entropy(out, kinds % out.shape[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probe.report(), x


def timm_net(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10)


def ours(name: str) -> Callable[[], nn.Module]:
    return lambda: nfnets.create_model(name)


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (net.build, net.shape) for name, net in NETS.items()},
    "resnet10t": (timm_net("resnet10t"), (3, 64, 64)),
    "test_resnet": (timm_net("test_resnet"), (3, 64, 64)),
    "test_efficientnet": (timm_net("test_efficientnet"), (3, 64, 64)),
    "test_efficientnet_gn": (timm_net("test_efficientnet_gn"), (3, 64, 64)),
    "test_byobnet": (timm_net("test_byobnet"), (3, 64, 64)),
    "test_nfnet": (timm_net("test_nfnet"), (3, 64, 64)),
    "test_convnext": (timm_net("test_convnext"), (3, 64, 64)),
    "test_mambaout": (timm_net("test_mambaout"), (3, 64, 64)),
    "regnety_002": (timm_net("regnety_002"), (3, 64, 64)),
    "mobilenetv3_small_050": (timm_net("mobilenetv3_small_050"), (3, 64, 64)),
    "test_vit": (lambda: timm.create_model("test_vit", num_classes=10, img_size=64), (3, 64, 64)),
    "test_vit4": (lambda: timm.create_model("test_vit4", num_classes=10, img_size=64), (3, 64, 64)),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), (3, 64, 64)),
    "V-Net": (SMALL["vnet3d"].build, (1, 8, 8, 8)),
    "fixup": (ours("fixup_resnet20_cifar"), (3, 32, 32)),
    "fixup-56": (ours("fixup_resnet56_cifar"), (3, 16, 16)),
    "nf_resnet26_cifar": (ours("nf_resnet26_cifar"), (3, 32, 32)),
}
# Not `fold`: what is folded untrained has means 0 and variances 1 for statistics, and no norm layer left.
METHODS = ("evonorm_s0", "fixed_variance", "fixup", "ghost_bn", "gn", "lsuv", "nf", "skipinit", "ws_gn")
TRAINED = (
    "MLP",
    "plain",
    "ResNet",
    "ConvNeXt",
    "ViT",
    "DenseNet",
    "U-Net",
    "NF-ResNet",
    "test_resnet",
    "test_nfnet",
)
LONG = ("MLP", "plain", "ResNet", "ConvNeXt", "ViT", "DenseNet", "U-Net", "NF-ResNet", "fixup-56")
SMALLER = {"test_resnet": 0.01, "test_nfnet": 0.001, "test_efficientnet": 0.01}
"""Those of timm's that are trained on images of 32 pixels, at a rate that does: an NFNet without AGC takes no more."""
CONVERTED = (
    ("ResNet", "nf"),
    ("ResNet", "gn"),
    ("ResNet", "skipinit"),
    ("ResNet", "fixup"),
    ("ResNet", "evonorm_s0"),
    ("U-Net", "nf"),
    ("DenseNet", "nf"),
)
STEPS, MANY = 30, 300


def cases() -> Iterator[tuple[str, Healthy]]:
    for name, (build, shape) in ZOO.items():
        yield f"{name}, noise, 16", Healthy(build, shape)
        yield f"{name}, smooth, 16", Healthy(build, shape, smooth=True)
    for name in ("ResNet", "ViT", "U-Net", "NF-ResNet", "MLP", "ConvNeXt"):
        for batch in (1, 2, 64):
            yield f"{name}, smooth, {batch}", Healthy(*ZOO[name], batch=batch, smooth=True)
    for method in METHODS:
        yield f"ResNet by {method}", Healthy(*ZOO["ResNet"], method=method, smooth=method in ("nf", "gn"))
        if method not in ("fixup", "skipinit"):
            yield f"DenseNet by {method}", Healthy(*ZOO["DenseNet"], method=method)
            yield f"U-Net by {method}", Healthy(*ZOO["U-Net"], method=method, smooth=True)
    for name in TRAINED:
        yield f"{name}, {STEPS} steps", Healthy(*ZOO[name], steps=STEPS, smooth=True)
    for name in LONG:
        yield f"{name}, {MANY} steps", Healthy(*ZOO[name], steps=MANY, smooth=True)
    for name, rate in SMALLER.items():
        yield f"{name}, {MANY} steps", Healthy(ZOO[name][0], (3, 32, 32), smooth=True, steps=MANY, rate=rate)
    for name, method in CONVERTED:
        yield (
            f"{name} by {method}, {MANY} steps",
            Healthy(*ZOO[name], method=method, steps=MANY, smooth=True),
        )


CASES = dict(cases())
KNOWN = {"DenseNet by lsuv": "mean-shift", "DenseNet by fixed_variance": "mean-shift"}
"""What breaks a rule: plain convolutions carry the mean on through all layers, and nothing centres it."""
SAMPLE = (
    "test_resnet, noise, 16",
    "ViT, smooth, 2",
    "U-Net by nf",
    "ResNet by fixup",
    "NF-ResNet, smooth, 64",
    "DenseNet, 30 steps",
    "MLP, 300 steps",
    "U-Net, 300 steps",
)


def held_out() -> Iterator[tuple[str, Healthy]]:
    """Reports of nets that no limit was chosen on, with other seeds."""
    for name, (build, shape) in FAMILIES.items():
        yield f"{name}, noise", Healthy(build, shape, batch=8, seed=1)
        yield f"{name}, smooth", Healthy(build, shape, batch=8, smooth=True, seed=2)
    for name in HELD_OUT:
        yield f"{name}, {STEPS} steps", Healthy(*FAMILIES[name], steps=STEPS, smooth=True, seed=3)


if __name__ == "__main__":
    judged = dict(held_out()) if "--held-out" in sys.argv else CASES
    only = [a for a in sys.argv[1:] if not a.startswith("--")]
    alarms = count = 0
    for name, case in judged.items():
        for report in reports_of(case) if not only or any(a in name for a in only) else ():
            count += 1
            if not (verdict := report.check()):
                alarms += 1
                print(f"{name}: {', '.join(verdict.broken)}: {str(verdict).splitlines()[0]}", flush=True)
    print(f"{alarms} alarms in {count} reports")
