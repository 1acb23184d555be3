"""Signal propagation, as in the paper's figures: before and after conversion, at initialization and after training.

    python -m experiments.signal_propagation [resnet50 resnet600 nfnet_f0] [--out runs/signal-propagation]

For each of ResNet-50, ResNet-600 and NFNet-F0: the BatchNorm net, what `nf` converts it to, the net that was designed
without a norm layer, and that one with its layers' scales measured on the images by LSUV. Average channel squared mean,
average channel variance and residual variance over the residual blocks; dashed what theory predicts. First at
initialization on unit normal noise, as in the paper (4 images of 192 pixels), and on Fashion-MNIST (16 images enlarged
to 64 pixels); SkipInit's scalars at 1 there, as in the paper (at their 0 every block is the identity). Then a short
training of each on Fashion-MNIST by plain SGD, from the usual initialization: 30 steps of 16 images. ResNet-600 is
shown at its full width, and trained with a quarter of its channels. About 25 core minutes; what is there already is
read back.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.common import conclude, markdown
from nfnets import attach
from nfnets.blocks import SkipInit
from nfnets.convert import convert
from nfnets.init import lsuv_
from nfnets.models import create_model
from nfnets.signal import SignalReport, profile
from nfnets.signal.report import merge_reports
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.hardware import hardware, versions

SIZE, IMAGES, STEPS, LR, SEED = 64, 16, 30, 0.005, 0
NOISE = (4, 3, 192, 192)
COMMAND = "python -m experiments.signal_propagation"
Build = Callable[[], nn.Module]


def families(slim: bool = False) -> dict[str, dict[str, Build]]:
    """Builders of the BatchNorm net and of the designed one, by family; what is between them is converted."""
    narrow: dict[str, Any] = {"widths": (64, 128, 256, 512)} if slim else {}
    return {
        "resnet50": {
            "BN-ResNet-50": lambda: timm.create_model("resnet50", num_classes=10, zero_init_last=False),
            "NF-ResNet-50": lambda: create_model("nf_resnet50", num_classes=10),
        },
        "resnet600": {
            "BN-ResNet-600": lambda: create_model("nf_resnet600", num_classes=10, norm="bn", **narrow),
            "NF-ResNet-600": lambda: create_model("nf_resnet600", num_classes=10, **narrow),
        },
        "nfnet_f0": {
            "BN-NFNet-F0": lambda: create_model("nfnet_f0", num_classes=10, norm="bn"),
            "NFNet-F0": lambda: create_model("nfnet_f0", num_classes=10),
        },
    }


def batches(count: int, images: int, size: int, name: str = "fashion-mnist") -> list[tuple[Tensor, Tensor]]:
    """The first batches of a gray data set, normalized, in three channels and enlarged."""
    data = load(RunConfig.create(data=name, train_limit=max(100, 2 * count * images)))
    x = (data.train.images[: count * images].float() / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    x = F.interpolate(x.expand(-1, 3, -1, -1), (size, size), mode="bilinear", align_corners=False)
    return list(zip(x.split(images), data.train.labels[: count * images].split(images), strict=True))


def models(builders: dict[str, Build], images: Tensor) -> dict[str, Build]:
    """The two nets, and between them the first one converted; last the other with its constants measured by LSUV."""
    (bn, before), (nf, designed) = builders.items()

    def converted() -> nn.Module:
        torch.manual_seed(SEED)
        return convert(before(), images, method="nf")

    def measured() -> nn.Module:
        torch.manual_seed(SEED)
        model = designed()
        lsuv_(model, images, orthonormal=False, strict=False)
        return model

    return {bn: before, f"{bn}, converted": converted, nf: designed, f"{nf}, LSUV": measured}


def at_start(builders: dict[str, Build], images: Tensor) -> SignalReport:
    """The signal at initialization, one net in memory at a time."""
    reports = []
    for name, build in models(builders, images).items():
        torch.manual_seed(SEED)
        model = build()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, SkipInit):
                    for scalar in module.parameters():
                        scalar.fill_(1.0)
        reports.append(profile({name: model}, images))
        del model
        gc.collect()
    return merge_reports(reports)


def after_training(
    builders: dict[str, Build], data: list[tuple[Tensor, Tensor]]
) -> tuple[SignalReport, dict[str, Any]]:
    """The signal on the first batch after plain SGD over all; and the mean losses of its first and last third."""
    reports, losses = [], {}
    for name, build in models(builders, data[0][0]).items():
        torch.manual_seed(SEED)
        model = build().train()
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, nesterov=True)
        if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            attach(optimizer, model, len(data[0][1]), method="nf", head=None, verbose=False)
        course = []
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            course.append(loss.item())
        third = max(1, len(course) // 3)
        losses[name] = [sum(course[:third]) / third, sum(course[-third:]) / third]
        print(f"{name}: loss {losses[name][0]:.3f} to {losses[name][1]:.3f}", flush=True)
        report = profile({name: model}, data[0][0])
        report.points = [replace(point, step=len(data)) for point in report.points]
        reports.append(report)
        del model, optimizer
        gc.collect()
    return merge_reports(reports), losses


def summary(report: SignalReport) -> list[list[str]]:
    """For each net: the range of the variance at joins, of the branches', how far theory is off, the rules' verdict."""
    lines = []
    for name in report.models:
        joins = [p for p in report.select(model=name) if p.role == "join"]
        theory = [p.var / p.predicted_var for p in joins if p.var and p.predicted_var]
        off = max((abs(math.log(ratio)) for ratio in theory), default=math.nan)
        rules = ", ".join(SignalReport(report.select(model=name)).check().broken) or "healthy"
        lines.append(
            [
                name,
                _range([p.var for p in joins]),
                _range([p.residual_var for p in joins]),
                _range([p.mean_sq for p in joins]),
                f"× {math.exp(off):.2f}" if theory else "–",
                rules,
            ]
        )
    return lines


def _range(values: list[float | None]) -> str:
    there = [v for v in values if v is not None]
    return f"{min(there):.2g} … {max(there):.2g}" if there else "–"


HEAD = ["net", "variance at joins", "residual variance", "squared mean", "theory off by up to", "rules"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(families()), metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=Path("runs/signal-propagation"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels")
    parser.add_argument("--images", type=int, default=IMAGES, help="of a batch")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = batches(options.steps, options.images, options.size)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(SEED))
    text = []
    for name in options.families:
        for when in ("noise", "initialization", "trained"):
            path = options.out / f"{name}-{when}.json"
            if not path.exists():
                if when == "trained":
                    report, losses = after_training(families(slim=True)[name], data)
                    report.meta |= {"steps": options.steps, "loss, first and last third": losses}
                else:
                    report = at_start(families()[name], noise if when == "noise" else data[0][0])
                report.meta |= {"command": COMMAND, "seed": SEED, "versions": versions()}
                report.meta |= {"hardware": hardware(torch.device("cpu")), "summary": summary(report)}
                report.plot(path.with_suffix(".png"))
                report.points = [p for p in report.points if p.block is not None]  # what the figure shows
                report.to_json(path)
            meta = SignalReport.from_json(path).meta
            text.append(f"## {name}, {when}\n\n{markdown(HEAD, meta.pop('summary'))}\n\n{_losses(meta)}")
            print(f"{name}, {when}: measured", flush=True)
    conclude(options.out, COMMAND, __doc__, "\n\n".join(text))


def _losses(meta: dict[str, Any]) -> str:
    losses = meta.get("loss, first and last third", {})
    found = [f"{name} {first:.2f} to {last:.2f}" for name, (first, last) in losses.items()]
    return f"Loss, first and last third of {meta.get('steps')} steps: {'; '.join(found)}." if found else ""


if __name__ == "__main__":
    main()
