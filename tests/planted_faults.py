"""Faults to plant in the nets of `planted_nets.py` and `held_out_nets.py`, and what a signal report finds of them.

    python tests/planted_faults.py                 # the table of docs/signal.md
    python tests/planted_faults.py --held-out      # of the nets that no limit was chosen on
    python tests/planted_faults.py --long gain     # of the faults with "gain" in their name, also in which nets

A fault is *found* where the verdict's first line names the planted layer, or what is right behind it; *elsewhere* where
a rule broke but the first line names another place; *noted* where a note tells it and no rule broke, so that
`nfnets check --backward` fails all the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from held_out_nets import HELD_OUT
from planted_nets import NETS
from torch import Tensor, nn

import nfnets
from nfnets.layers import ScaledStdConv2d
from nfnets.signal import SignalReport
from nfnets.signal.notes import doubts


class Subject:
    """One net with its batch, for a fault to change."""

    def __init__(self, name: str, batch: int = 64) -> None:
        torch.manual_seed(0 if name in NETS else 1)
        self.net = (NETS | HELD_OUT)[name]
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
    gain = getattr(layer, "gain", None)
    return gain if isinstance(gain, Tensor) else layer.weight


def channel(value: float) -> Callable[[Subject], None]:
    def plant(s: Subject) -> None:
        layer = s.module(s.net.layer)
        if size_of(layer) is not layer.weight and math.isfinite(value):
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
                size_of(layer).div_(s.net.gain)
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
    """Attention whose logits are divided by no square root of the width, until `root` is set."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads, self.root = inner.qkv, inner.proj, inner.num_heads, None

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1)
        y = (logits / self.root if self.root else logits).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


def unscaled(s: Subject) -> None:
    found = [(name, module) for name, module in s.model.named_modules() if hasattr(module, "qkv")]
    if not found:
        raise Absent
    for name, module in found:
        nn.init.xavier_uniform_(module.qkv.weight)
        s.put(name, Unscaled(module))
    s.at = (found[0][0],)


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


def trained(
    s: Subject,
    lr: float = 1.0,
    clipping: float | None = None,
    poison: bool = False,
    decay: float = 0.0,
    steps: int = 9,
) -> SignalReport:
    """A short training under a probe, at `lr` times the net's rate."""
    optimizer = torch.optim.SGD(s.model.parameters(), lr=s.net.rate * lr, momentum=0.9, weight_decay=decay)
    if clipping is not None:
        nfnets.attach_agc(optimizer, s.model, clipping=clipping, exclude=s.layers()[-1])
    x = s.inputs[:32]
    with nfnets.probe(
        s.model.train(), every=max(1, steps // 3), backward=True, updates=True, warn=False
    ) as probe:
        for _ in range(steps):
            out = s.model(x)
            out = out.flatten(2).mean(2) if out.dim() > 2 else out
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
        return subject, trained(subject, **subject.training)
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
    return "noted" if NOTED.get(fault) in doubts(report.notes) else "missed"


NOTED = {
    "frozen layer": "frozen",
    "training: frozen": "frozen",
    "head of zeros": "zero-head",
    "BatchNorm on two samples": "few-samples",
    "training: dropout 0.9": "dropout",
}
"""What `nfnets check --allow` calls a fault that a note tells."""


OTHERWISE: dict[tuple[str, str], str] = {
    **{("30 % of a layer dead", n): "missed" for n in ("ResNet", "ConvNeXt", "ViT", "NF-ResNet")},
    ("gain missing in all", "NF-ResNet"): "missed",
    ("α twice", "NF-ResNet"): "missed",
    **{("fan_out for fan_in", n): "missed" for n in ("MLP", "plain")},
    **{(fault, name): "noted" for fault in NOTED for name in NETS},
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


def main(long: bool, nets: Iterable[str], only: list[str]) -> None:
    print("| fault | nets | found | elsewhere | noted | missed |\n|---|---|---|---|---|---|")
    for fault in [f for f in FAULTS if not only or any(o in f for o in only)]:
        seen: dict[str, list[str]] = {}
        for name in nets:
            try:
                seen.setdefault(outcome(fault, name), []).append(name)
            except Absent:
                continue
        counts = [len(seen.get(how, ())) for how in ("found", "elsewhere", "noted", "missed")]
        print(f"| {fault} | {sum(counts)} | " + " | ".join(str(c or "–") for c in counts) + " |", flush=True)
        if long:
            print("   ", {how: names for how, names in seen.items() if how != "found"}, flush=True)


if __name__ == "__main__":
    given = [a for a in sys.argv[1:] if not a.startswith("--")]
    main("--long" in sys.argv, HELD_OUT if "--held-out" in sys.argv else NETS, given)
