"""What every method gives on nets of every kind, kept in `golden.json`: a change that means to change no number holds
to it, one that changes a default writes it anew and says so.

    python tests/golden.py          # compare, and say what differs
    python tests/golden.py --write  # after a change of a default, with the reason in `CHANGED` below

Everything runs in float64, so that no order of summation shows; weights are drawn from fixed seeds.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from conversion_nets import NETS
from coverage_nets import SMALL, Pyramid
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import nfnets
from nfnets.errors import UserError

FILE = Path(__file__).with_name("golden.json")
CHANGED = [
    "reports have a column training_var",
    "fixed_variance measures float64 nets in float64, no longer in float32: the eighth digit moves",
    "reports have columns of the layer itself (quiet, peak, weight_shape, groups, gain, frozen, identical, batch_norm)",
    "dyt, derf and tune are new; the other methods' numbers are as they were",
    "ln, online and bcn are new; the other methods' numbers are as they were",
    "reports have a column logits",
]
"""Why the file was written anew, newest last."""


class Inception(nn.Module):
    """Parallel paths, concatenated; nothing is added."""

    def __init__(self, width: int = 8):
        super().__init__()

        def unit(before: int, after: int, kernel: int) -> nn.Sequential:
            conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))

        self.stem = unit(3, width, 3)
        self.a = unit(width, width, 1)
        self.b = nn.Sequential(unit(width, width, 1), unit(width, width, 3))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(width, width, 1))
        self.join, self.fc = unit(3 * width, width, 3), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.join(torch.cat([self.a(x), self.b(x), self.c(x)], 1))
        return self.fc(x.mean((2, 3)))


class Kind(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pictures(size: int = 16, channels: int = 3) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: (noise(batch, channels, size, size),)


KINDS: dict[str, Kind] = {
    "residual, post-activation": Kind(
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64
        ),
        pictures(32),
    ),
    "residual, pre-activation": Kind(NETS["pre-activation"], pictures()),
    "depthwise": Kind(NETS["mobile"], pictures()),
    "squeeze-excite": Kind(SMALL["squeeze"].build, pictures(32)),
    "concatenated": Kind(NETS["dense"], pictures()),
    "DenseNet": Kind(lambda: torchvision.models.DenseNet(8, (3, 3), 16, num_classes=5), pictures(32)),
    "inception": Kind(Inception, pictures()),
    "RepVGG": Kind(SMALL["reparameterized"].build, pictures()),
    "U-Net": Kind(SMALL["unet"].build, pictures(16, 2)),
    "1-D": Kind(SMALL["audio"].build, lambda batch: (noise(batch, 1, 128),)),
    "3-D": Kind(SMALL["vnet3d"].build, lambda batch: (noise(batch, 1, 8, 8, 8),)),
    "shared modules": Kind(
        SMALL["siamese"].build, lambda batch: (noise(batch, 3, 16, 16), noise(batch, 3, 16, 16).flip(0))
    ),
    "fused activations": Kind(NETS["fused"], pictures()),
    "transposed": Kind(NETS["decoder"], pictures()),
    "detector's backbone": Kind(Pyramid, pictures(64)),
}
BATCHES = (4, 32)
"""Below and from 32 samples on, where `nf` sets channels."""
MEASURED = {"nf", "lsuv", "fixed_variance", "fixup", "skipinit"}
"""Methods whose numbers depend on the images: the others are looked at with one batch."""


def model_of(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    model = kind.build().double()
    generator = torch.Generator().manual_seed(1)
    for (
        module
    ) in model.modules():  # untrained norm layers would hide what is done with γ, β and the statistics
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model


def rounded(value: float) -> float | str:
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)


def numbers_of(tensor: Tensor) -> list[float | str]:
    """Enough to tell tensors apart: mean, root mean square, and a sum with weights that vary from entry to entry."""
    flat = tensor.detach().double().flatten()
    weights = torch.sin(1 + torch.arange(len(flat), dtype=torch.float64))
    found = (flat.mean(), flat.square().mean().sqrt(), (flat * weights).sum())
    return [rounded(float(number)) for number in found]


def conversion(name: str, method: str, batch: int) -> dict[str, Any]:
    """What a method makes of a net: its plan, its tensors and what it puts out, or why it refuses."""
    kind = KINDS[name]
    model, inputs = model_of(kind), kind.inputs(batch)
    torch.manual_seed(2)
    try:
        plan = nfnets.plan(model, *inputs, method=method)
        torch.manual_seed(2)
        converted = nfnets.convert(model, *inputs, method=method)
    except UserError as error:
        return {"refused": str(error).splitlines()[0]}
    state = {n: t for n, t in converted.state_dict().items() if t.is_floating_point()}
    constants = {n: rounded(float(t)) for n, t in state.items() if t.numel() == 1}
    others = {n: numbers_of(t) for n, t in state.items() if t.numel() > 1}
    with torch.no_grad():
        outputs = {
            mode: [numbers_of(t) for t in tree_leaves(converted.train(mode == "training")(*inputs))]
            for mode in ("evaluation", "training")
        }
    rows = [f"{row.path}: {row.action} {row.replaced}".strip() for row in [*plan.rows, *plan.layers]]
    return {"plan": rows, "constants": constants, "tensors": others, "outputs": outputs}


def report(name: str, method: str | None) -> list[dict[str, Any]]:
    """The signal report of a net, or of what a method makes of it."""
    kind = KINDS[name]
    model, inputs = model_of(kind), kind.inputs(8)
    if method is not None:
        model = nfnets.convert(model, *inputs, method=method)
    found = json.loads(json.dumps(nfnets.profile(model, *inputs).to_dict(), default=str))
    return tree_map_only(float, rounded, found)


def training(name: str, method: str | None, steps: int = 20) -> list[float | str]:
    """Losses of a seeded run: SGD with momentum, parameter groups, clipping."""
    kind = KINDS[name]
    model, inputs = model_of(kind), kind.inputs(8)
    if method is not None:
        model = nfnets.convert(model, *inputs, method=method)
    optimizer = torch.optim.SGD(nfnets.param_groups(model, lr=0.05, weight_decay=1e-4), momentum=0.9)
    nfnets.attach_agc(optimizer, model, clipping=0.1, head=20)
    labels = torch.arange(8) % 5
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(*(x.roll(step, 0) for x in inputs)), labels.roll(step))
        loss.backward()
        optimizer.step()
        losses.append(rounded(loss.item()))
    return losses


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every entry of the file, by name."""
    for name in KINDS:
        for method in sorted(nfnets.convert.list_methods()):
            for batch in BATCHES if method in MEASURED else BATCHES[:1]:
                yield (
                    f"{name} | {method} | {batch}",
                    lambda n=name, m=method, b=batch: conversion(n, m, b),
                )
    for name in ("residual, post-activation", "DenseNet", "U-Net"):
        for method in (None, "nf"):
            yield f"{name} | report | {method}", lambda n=name, m=method: report(n, m)
    for name in ("residual, pre-activation", "depthwise", "concatenated"):
        for method in (None, "nf", "fold"):
            yield f"{name} | training | {method}", lambda n=name, m=method: training(n, m)


def differences(expected: Any, found: Any, where: str = "", tolerance: float = 1e-7) -> Iterator[str]:
    """Where two entries differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*expected, *found]):
            if key not in expected or key not in found:
                yield f"{where}.{key} only in the {'file' if key in expected else 'code'}"
            else:
                yield from differences(expected[key], found[key], f"{where}.{key}", tolerance)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{where}[{index}]", tolerance)
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(expected, found, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{where}: {expected} in the file, {found} now"
    elif expected != found:
        yield f"{where}: {expected!r} in the file, {found!r} now"


def kept() -> dict[str, Any]:
    return json.loads(FILE.read_text())["entries"]


def main(write: bool) -> int:
    known = kept() if FILE.exists() else {}
    entries, off = {}, 0
    for name, make in cases():
        entries[name] = copy.deepcopy(make())
        for line in [*differences(known.get(name, {}), entries[name])][:5]:
            off += 1
            print(f"{name}{line}", flush=True)
    if write:
        lines = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in entries.items()]
        head = json.dumps(CHANGED, ensure_ascii=False)
        FILE.write_text(f'{{"changed": {head}, "entries": {{\n' + ",\n".join(lines) + "\n}}\n")
    return int(bool(off) and not write)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv))
