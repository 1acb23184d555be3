"""Eight small nets, and 35 faults to plant in them: what a signal report finds of those, and where.

    python tests/planted_faults.py          # the table of docs/signal.md
    python tests/planted_faults.py --long gain   # of the faults with "gain" in their name, also in which nets

A fault is *found* where the verdict's first line names the planted layer, or what is right behind it; *elsewhere* where
a rule broke but the first line names another place; *noted* where the report holds it as a note and breaks no rule.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from coverage_nets import UNet
from torch import Tensor, nn

import nfnets
from nfnets.layers import ScaledStdConv2d
from nfnets.signal import SignalReport

CLASSES = 10


class Net(NamedTuple):
    """A net and the places in it that faults are planted at."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layer: str
    """A weight layer in the middle."""
    behind: tuple[str, ...]
    """Points right behind that layer: its norm layer, its activation, what they are added to."""
    end: str = ""
    """The last weight layer of a branch, if there are branches."""
    end_behind: tuple[str, ...] = ()
    before_activation: str = ""
    """The layer whose bias can kill the units of an activation."""
    dead_at: str = ""
    block: str = ""
    """A module on the trunk, for detaching it."""
    gain: float = 0.0
    """The factor that a layer's gain stands for where weights carry one, else 0."""


def he(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return net


def mlp() -> nn.Module:
    widths = [32, 48, 64, 96, 96, 128, 128]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return he(nn.Sequential(*layers, nn.Linear(128, CLASSES)))


def plain() -> nn.Module:
    widths = [3, 16, 16, 32, 32, 64, 64]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Conv2d(a, b, 3, 1, 1), nn.ReLU())]
    return he(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)))


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        depth=4,
        embed_dim=48,
        num_heads=3,
        num_classes=CLASSES,
    )


def convnext() -> nn.Module:
    net = timm.create_model("test_convnext", num_classes=CLASSES)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("gamma"):
                weight.fill_(1.0)  # branches that start at a millionth would hide what is planted in them
    return net


def sixteen(channels: int = 3, size: int = 16) -> tuple[int, ...]:
    return channels, size, size


NETS: dict[str, Net] = {
    "MLP": Net(mlp, (32,), "6", ("7",), before_activation="6", dead_at="7", block="7", gain=2**0.5),
    "plain": Net(plain, sixteen(), "6", ("7",), before_activation="6", dead_at="7", block="7", gain=2**0.5),
    "ResNet": Net(
        lambda: nfnets.create_model("bn_resnet20_cifar"),
        sixteen(),
        "layer2.1.conv1",
        ("layer2.1.bn1",),
        end="layer2.1.bn2",
        end_behind=("layer2.1",),
        before_activation="layer2.1.bn1",
        dead_at="layer2.1.relu",
        block="layer2.1",
    ),
    "ConvNeXt": Net(
        convnext,
        sixteen(3, 32),
        "stages.2.blocks.1.mlp.fc1",
        ("stages.2.blocks.1.mlp.act",),
        end="stages.2.blocks.2.mlp.fc2",
        end_behind=("stages.2.blocks.2",),
        before_activation="stages.2.blocks.1.mlp.fc1",
        dead_at="stages.2.blocks.1.mlp.act",
        block="stages.1.blocks.1",
    ),
    "ViT": Net(
        vit,
        sixteen(),
        "blocks.2.mlp.fc1",
        ("blocks.2.mlp.act",),
        end="blocks.1.mlp.fc2",
        end_behind=("blocks.1#2",),
        before_activation="blocks.2.mlp.fc1",
        dead_at="blocks.2.mlp.act",
        block="blocks.1",
    ),
    "DenseNet": Net(
        lambda: torchvision.models.DenseNet(8, (3, 3), 16, num_classes=CLASSES),
        sixteen(3, 32),
        "features.denseblock1.denselayer2.conv1",
        ("features.denseblock1.denselayer2.norm2",),
        before_activation="features.denseblock1.denselayer2.norm2",
        dead_at="features.denseblock1.denselayer2.relu2",
        block="features.transition1",
    ),
    "U-Net": Net(
        UNet,
        sixteen(2),
        "bottom.0",
        ("bottom.1",),
        before_activation="bottom.1",
        dead_at="bottom.2",
        block="bottom",
    ),
    "NF-ResNet": Net(
        lambda: nfnets.create_model("nf_resnet20_cifar"),
        sixteen(),
        "stages.1.1.branch.conv1",
        ("stages.1.1.branch.act2",),
        end="stages.1.1.branch.conv2",
        end_behind=("stages.1.1",),
        before_activation="stages.1.1.branch.conv1",
        dead_at="stages.1.1.branch.act2",
        block="stages.1.1",
        gain=1.7128585577011108,
    ),
}


class Subject:
    """One net with its batch, for a fault to change."""

    def __init__(self, name: str, batch: int = 64) -> None:
        torch.manual_seed(0)
        self.net = NETS[name]
        self.model = self.net.build()
        self.inputs = torch.randn(batch, *self.net.shape)
        self.at = ("*",)
        """Names that the verdict may begin with, `*` for any."""
        self.training: dict[str, Any] = {}

    def module(self, path: str) -> Any:
        return self.model.get_submodule(path)

    def put(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.module(parent), name, module)

    def layers(self) -> list[Any]:
        return [m for m in self.model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)]

    @property
    def normalized(self) -> bool:
        return any("Norm" in type(m).__name__ for m in self.model.modules())


class Absent(Exception):
    """The fault has no place in this net."""


class Detached(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).detach()


def size_of(layer: Any) -> Tensor:
    """What scales a layer: a standardized one is blind to the size of its weight."""
    return layer.gain if isinstance(layer, ScaledStdConv2d) else layer.weight


def channel(value: float) -> Callable[[Subject], None]:
    def plant(s: Subject) -> None:
        layer = s.module(s.net.layer)
        if isinstance(layer, ScaledStdConv2d) and math.isfinite(value):
            layer.gain[0] = value
        else:
            layer.weight[0] = value
            layer.weight[0].flatten()[::2].neg_()
        s.at = (s.net.layer, *s.net.behind)

    return plant


def scaled(factor: float) -> Callable[[Subject], None]:
    def plant(s: Subject) -> None:
        size_of(s.module(s.net.layer)).mul_(factor)
        s.at = (s.net.layer, *s.net.behind)

    return plant


def end_scaled(factor: float) -> Callable[[Subject], None]:
    def plant(s: Subject) -> None:
        if not s.net.end:
            raise Absent
        size_of(s.module(s.net.end)).mul_(factor)
        s.at = (s.net.end, *s.net.end_behind)

    return plant


def dead(share: float) -> Callable[[Subject], None]:
    def plant(s: Subject) -> None:
        layer = s.module(s.net.before_activation)
        count = round(share * len(layer.bias))
        layer.bias[:count] = -6.0 if s.net.dead_at.endswith("mlp.act") else -20.0
        s.at = (s.net.dead_at, s.net.before_activation)

    return plant


def collapsed(s: Subject) -> None:
    s.inputs = s.inputs[:1] + 1e-3 * torch.randn_like(s.inputs)
    s.at = ("input",)


def gain_missing(everywhere: bool) -> Callable[[Subject], None]:
    def plant(s: Subject) -> None:
        if not s.net.gain:
            raise Absent
        for layer in s.layers()[1:-1] if everywhere else [s.module(s.net.layer)]:
            if isinstance(layer, ScaledStdConv2d):
                layer.scale.div_(s.net.gain)
            else:
                layer.weight.div_(s.net.gain)
        s.at = ("*",) if everywhere else (s.net.layer, *s.net.behind)

    return plant


def alpha_twice(s: Subject) -> None:
    if not isinstance(s.module(s.net.end) if s.net.end else None, ScaledStdConv2d):
        raise Absent
    for layer in s.layers():
        if hasattr(layer, "alpha"):
            layer.alpha.square_()


def initialized(how: Callable[[Any], None]) -> Callable[[Subject], None]:
    def plant(s: Subject) -> None:
        if s.normalized or any(isinstance(m, ScaledStdConv2d) for m in s.model.modules()):
            raise Absent
        for layer in s.layers():
            how(layer)

    return plant


def inputs(change: Callable[[Tensor], Tensor]) -> Callable[[Subject], None]:
    def plant(s: Subject) -> None:
        s.inputs = change(s.inputs)
        s.at = ("input",)

    return plant


def bytes_of(x: Tensor) -> Tensor:
    return (x * 64 + 128).clamp(0, 255).round()


def branch_detached(s: Subject) -> None:
    if not s.net.end:
        raise Absent
    s.put(s.net.end, Detached(s.module(s.net.end)))
    s.at = (s.net.end, *s.net.end_behind)


def trunk_detached(s: Subject) -> None:
    s.put(s.net.block, Detached(s.module(s.net.block)))
    s.at = (s.net.block, s.net.layer)  # before an activation that is detached, the layer


def frozen(s: Subject) -> None:
    s.module(s.net.layer).requires_grad_(False)
    s.at = (s.net.layer,)


def identical(s: Subject) -> None:
    layer = s.module(s.net.layer)
    layer.weight.copy_(layer.weight[:1].expand_as(layer.weight).clone())
    s.at = (s.net.layer, *s.net.behind)


def equal(s: Subject) -> None:
    for layer in s.layers():
        layer.weight.fill_(0.05)


def double_softmax(s: Subject) -> None:
    s.model = nn.Sequential(s.model, nn.Softmax(1))
    s.at = ("1",)


class Unscaled(nn.Module):
    """Attention whose logits were never divided by the square root of the width."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = inner.qkv, inner.proj, inner.num_heads

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


def unscaled(s: Subject) -> None:
    for name, module in list(s.model.named_modules()):
        if hasattr(module, "qkv") and not isinstance(module, Unscaled):
            nn.init.xavier_uniform_(module.qkv.weight)
            s.put(name, Unscaled(module))
    if not any(isinstance(m, Unscaled) for m in s.model.modules()):
        raise Absent
    s.at = ("blocks.0.attn",)


def zero_head(s: Subject) -> None:
    s.layers()[-1].weight.zero_()
    s.layers()[-1].bias.zero_()
    s.at = ("note",)


def batch_of_two(s: Subject) -> None:
    if not any(isinstance(m, nn.BatchNorm2d) for m in s.model.modules()):
        raise Absent
    s.inputs = s.inputs[:2]


def training(**how: Any) -> Callable[[Subject], None]:
    def plant(s: Subject) -> None:
        s.training = how

    return plant


def then(plant: Callable[[Subject], None]) -> Callable[[Subject], None]:
    def both(s: Subject) -> None:
        plant(s)
        s.training = {"steps": 9}

    return both


def dropout(s: Subject) -> None:
    s.put(s.net.layer, nn.Sequential(s.module(s.net.layer), nn.Dropout(0.9)))
    s.training, s.at = {"steps": 9}, (s.net.layer, *s.net.behind)


FAULTS: dict[str, Callable[[Subject], None]] = {
    "NaN in one channel": channel(math.nan),
    "1e5 in one channel": channel(1e5),
    "inputs nearly the same": collapsed,
    "90 % of a layer dead": dead(0.9),
    "30 % of a layer dead": dead(0.3),
    "one layer × 3": scaled(3.0),
    "one layer × 30": scaled(30.0),
    "one layer × 0.1": scaled(0.1),
    "branch end × 10": end_scaled(10.0),
    "branch end × 100": end_scaled(100.0),
    "gain missing in one layer": gain_missing(False),
    "gain missing in all": gain_missing(True),
    "α twice": alpha_twice,
    "fan_out for fan_in": initialized(
        lambda m: nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    ),
    "torch's default initialization": initialized(lambda m: m.reset_parameters()),
    "inputs 0..255": inputs(bytes_of),
    "inputs divided by 255 twice": inputs(lambda x: bytes_of(x) / 255 / 255),
    "inputs' mean + 10": inputs(lambda x: x + 10),
    "branch detached": branch_detached,
    "trunk detached": trunk_detached,
    "frozen layer": frozen,
    "units of a layer identical": identical,
    "all weights equal": equal,
    "softmax before the loss's own": double_softmax,
    "attention scale missing": unscaled,
    "head of zeros": zero_head,
    "BatchNorm on two samples": batch_of_two,
    "training: AGC 100 × too small": training(clipping=1e-4),
    "training: rate × 1e-5": training(lr=1e-5),
    "training: frozen": then(frozen),
    "training: detached": then(trunk_detached),
    "training: dropout 0.9": dropout,
    "training: rate × 30": training(lr=30.0),
    "training: NaN in the loss": training(poison=True),
    "training: weight decay × 1e4": training(decay=1.0, steps=60),
}
RATE = {"MLP": 0.02, "plain": 0.02, "ResNet": 0.1, "ConvNeXt": 0.05, "ViT": 0.05}


def trained(
    s: Subject,
    name: str,
    lr: float = 1.0,
    clipping: float | None = None,
    poison: bool = False,
    decay: float = 0.0,
    steps: int = 9,
) -> SignalReport:
    """A short training under a probe; rates as `RATE`, times `lr`."""
    rate = RATE.get(name, 0.1) * lr
    optimizer = torch.optim.SGD(s.model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    if clipping is not None:
        head: Any = s.model.out if name == "U-Net" else "head"
        nfnets.attach_agc(optimizer, s.model, clipping=clipping, exclude=head)
    x = s.inputs[:32]
    with nfnets.probe(s.model.train(), every=max(1, steps // 3), backward=True, updates=True) as probe:
        for _ in range(steps):
            out = s.model(x).flatten(2).mean(2) if name == "U-Net" else s.model(x)
            loss = F.cross_entropy(out, torch.arange(len(x)) % out.shape[1])
            optimizer.zero_grad()
            (loss * math.nan if poison else loss).backward()
            optimizer.step()
    return probe.report()


def report_of(fault: str | None, name: str) -> tuple[Subject, SignalReport]:
    """What the report says of a net with a fault (or without); `Absent` where the net has no place for it."""
    subject = Subject(name)
    if fault is not None:
        with torch.no_grad():
            FAULTS[fault](subject)
    if subject.training:
        return subject, trained(subject, name, **subject.training)
    return subject, nfnets.profile(subject.model, subject.inputs, backward=True)


def first_of(report: SignalReport) -> str | None:
    """The place that the verdict begins with, `None` of a healthy one."""
    verdict = report.check()
    if verdict:
        return None
    cause = getattr(verdict, "causes", verdict.findings)[0]
    return cause.name


def outcome(fault: str, name: str) -> str:
    """`found`, `elsewhere`, `noted` or `missed`."""
    subject, report = report_of(fault, name)
    place = first_of(report)
    if place is not None:
        near = any(at == "*" or place == at or place.startswith(f"{at}.") for at in subject.at)
        return "found" if near else "elsewhere"
    noted = any(mark in note for note in report.notes for mark in MARKS.get(fault.split(": ")[-1], ()))
    return "noted" if noted else "missed"


MARKS = {
    "frozen layer": ("frozen",),
    "frozen": ("frozen",),
    "head of zeros": ("zero",),
    "BatchNorm on two samples": ("BatchNorm",),
    "dropout 0.9": ("dropout",),
    "softmax before the loss's own": ("softmax",),
    "attention scale missing": ("attention",),
}
"""A word that the note has where a fault is told by a note."""


OTHERWISE: dict[tuple[str, str], str] = {
    **{("30 % of a layer dead", n): "missed" for n in ("ResNet", "ConvNeXt", "ViT", "NF-ResNet")},
    ("gain missing in all", "NF-ResNet"): "missed",
    ("α twice", "NF-ResNet"): "missed",
    **{("fan_out for fan_in", n): "missed" for n in ("MLP", "plain")},
    **{
        (fault, name): "noted"
        for fault in (
            "frozen layer",
            "softmax before the loss's own",
            "attention scale missing",
            "head of zeros",
            "BatchNorm on two samples",
            "training: frozen",
            "training: dropout 0.9",
        )
        for name in NETS
    },
    **{("training: dropout 0.9", n): "elsewhere" for n in ("MLP", "plain", "ViT", "NF-ResNet")},
}
"""What is not found where it was planted, by fault and net."""
SAMPLE = [
    ("NaN in one channel", "plain"),
    ("inputs nearly the same", "MLP"),
    ("90 % of a layer dead", "ViT"),
    ("one layer × 3", "ResNet"),
    ("one layer × 0.1", "MLP"),
    ("branch end × 10", "NF-ResNet"),
    ("gain missing in one layer", "plain"),
    ("torch's default initialization", "MLP"),
    ("inputs 0..255", "U-Net"),
    ("inputs' mean + 10", "plain"),
    ("branch detached", "ViT"),
    ("frozen layer", "plain"),
    ("units of a layer identical", "MLP"),
    ("softmax before the loss's own", "MLP"),
    ("attention scale missing", "ViT"),
    ("training: AGC 100 × too small", "MLP"),
    ("training: rate × 30", "MLP"),
    ("training: NaN in the loss", "plain"),
    ("α twice", "NF-ResNet"),
]
"""What `make test` plants."""


def main(long: bool, only: list[str]) -> None:
    print("| fault | nets | found | elsewhere | noted | missed |\n|---|---|---|---|---|---|")
    for fault in [f for f in FAULTS if not only or any(o in f for o in only)]:
        seen: dict[str, list[str]] = {}
        for name in NETS:
            try:
                seen.setdefault(outcome(fault, name), []).append(name)
            except Absent:
                continue
        counts = [len(seen.get(how, ())) for how in ("found", "elsewhere", "noted", "missed")]
        print(f"| {fault} | {sum(counts)} | " + " | ".join(str(c or "–") for c in counts) + " |", flush=True)
        if long:
            print("   ", {how: names for how, names in seen.items() if how != "found"}, flush=True)


if __name__ == "__main__":
    main("--long" in sys.argv, [a for a in sys.argv[1:] if a != "--long"])
