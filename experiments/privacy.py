"""Differential privacy: models converted by `nf` pass Opacus' validator and train by DP-SGD; GroupNorm beside them.

    pip install opacus
    python -m experiments.privacy [--out runs/privacy] [--jobs 2]

First, small nets of six families are converted: what Opacus' validator says, and how far the per-sample gradients are
from one backward pass for each sample. Then ResNet-8 (pre-activation) on digits (1,294 training images of 8×8 pixels)
with DP-SGD to ε = 8 at δ = 1e-4: Poisson batches of 128 on average, 10 epochs, gradients clipped to norm 1. `nf`, its
constants measured on noise and not on private images, against GroupNorm as Opacus' own `ModuleValidator.fix` puts it
in. Three learning rates on validation data with a tuning seed, then three paired seeds. The accountant does not count
the search, for either. About 6 minutes on 2 cores. Interrupted, the same command goes on.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from experiments import nets
from experiments.common import (
    COLORS,
    accuracies,
    arguments,
    compared,
    conclude,
    markdown,
    panels,
    percent,
    percent_axis,
    save,
    search,
)
from experiments.federated import accuracy, parts
from nfnets.convert import convert
from nfnets.models import create_model
from nfnets.privacy import grad_sample_module
from nfnets.train.compare.experiment import write_json

EPSILON, DELTA, NORM, BATCH, EPOCHS = 8.0, 1e-4, 1.0, 128, 10
LRS = (0.1, 0.3, 1.0)
ARMS = ("gn", "nf")
FAMILIES = ("resnet", "vgg", "densenet", "mobilenetv2", "mobilenetv3", "efficientnet")


def private_model(arm: str, size: int) -> nn.Module:
    """A net without BatchNorm, for Opacus, of the seed that is set: Opacus' own fix, or a conversion on noise."""
    from opacus.validators import ModuleValidator

    model = create_model("nf_resnet8_cifar", norm="bn", in_chans=1, num_classes=10)
    if arm == "gn":
        model = ModuleValidator.fix(model)
    else:
        model = convert(model, torch.randn(256, 1, size, size), method=arm)
    return grad_sample_module(model)


def private(arm: str, lr: float, seed: int, tested: bool, epochs: int = EPOCHS) -> dict[str, Any]:
    """One DP-SGD run."""
    from opacus import PrivacyEngine

    warnings.simplefilter("ignore")  # about secure random numbers, and about what torch will deprecate
    torch.set_num_threads(1)
    train, val, test = parts()
    torch.manual_seed(seed)
    model = private_model(arm, train[0].shape[-1]).train()
    loader = DataLoader(TensorDataset(*train), BATCH, generator=torch.Generator().manual_seed(seed))
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr, momentum=0.9),
        data_loader=loader,
        epochs=epochs,
        target_epsilon=EPSILON,
        target_delta=DELTA,
        max_grad_norm=NORM,
        noise_generator=torch.Generator().manual_seed(seed),
    )
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.disable_hooks()
    return {
        "status": "done",
        "val_accuracy": accuracy(model, val),
        "test_accuracy": accuracy(model, test) if tested else None,
        "epsilon": engine.get_epsilon(DELTA),
        "noise_multiplier": optimizer.noise_multiplier,
    }


def gradient_error(model: nn.Module, images: Tensor) -> float:
    """The largest relative error of a per-sample gradient against one backward pass for each sample."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    wrapped = grad_sample_module(model, loss_reduction="sum")
    wrapped(images).square().sum().backward()
    found = {name: p.grad_sample for name, p in model.named_parameters()}
    wrapped.disable_hooks()
    worst = 0.0
    for row in range(len(images)):
        model.zero_grad()
        model(images[row : row + 1]).square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            worst = max(worst, ((found[name][row] - p.grad).norm() / p.grad.norm().clamp(min=1e-6)).item())
    return worst


def families(out: Path) -> str:
    """Validator and gradients for every family, as Markdown."""
    from opacus.validators import ModuleValidator

    file, body = out / "families.json", []
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        for name in FAMILIES:
            torch.manual_seed(0)
            model = getattr(nets, name)(10, 1)
            before = len(ModuleValidator.validate(model.train()))
            converted = convert(model, torch.randn(32, 1, 28, 28), method="nf").train()
            after = len(ModuleValidator.validate(converted))
            body.append([name, before, after, f"{gradient_error(converted, torch.randn(4, 1, 28, 28)):.1e}"])
        write_json(file, body)
    head = [
        "family",
        "validator's errors before",
        "after `nf`",
        "worst error of a per-sample gradient, relative",
    ]
    return markdown(head, json.loads(file.read_text()))


def table(results: dict[str, Any]) -> str:
    """Test accuracy of both arms and their paired difference, as Markdown."""
    rates = {c["arm"]: c["lr"] for c in results["chosen"]}
    gn, nf = (accuracies(results, arm, 0) for arm in ARMS)
    spent = max(r["epsilon"] for r in results["runs"])
    body = [
        [
            f"{spent:.2f}",
            *(f"{percent(v)} (lr {rates[a]:g})" for a, v in zip(ARMS, (gn, nf), strict=True)),
            compared(nf, gn),
        ]
    ]
    return markdown(["ε", "GroupNorm (Opacus' fix), test %", "NF, test %", "NF − GN, points [95 %]"], body)


def draw(results: dict[str, Any], path: Path) -> None:
    """Left the search, right the reported seeds."""
    figure, (left, right) = panels(2, width=7.4, height=3.4, sharey=True)
    for place, (arm, color) in enumerate(zip(ARMS, COLORS, strict=False)):
        label = {"gn": "GroupNorm (Opacus' fix)", "nf": "NF"}[arm]
        tried = sorted(
            (r["lr"], r["val_accuracy"]) for r in results["runs"] if r["arm"] == arm and not r["final"]
        )
        left.plot(*zip(*tried, strict=True), "o-", color=color, label=label)
        values = accuracies(results, arm, 0)
        right.scatter([place] * len(values), values, s=20, alpha=0.55, color=color, linewidths=0)
        right.plot([place - 0.2, place + 0.2], [sum(values) / len(values)] * 2, color=color, lw=2)
    left.set_xscale("log")
    left.set_xlabel("learning rate")
    left.legend(frameon=False, fontsize=8)
    percent_axis(left, "validation accuracy")
    percent_axis(right, "test accuracy, seeds and mean")
    right.tick_params(labelleft=True)
    right.set_xticks(range(len(ARMS)), ["GroupNorm", "NF"])
    right.set_xlim(-0.6, len(ARMS) - 0.4)
    save(figure, path)


def main() -> None:
    options = arguments(__doc__, "runs/privacy").parse_args()
    validated = families(options.out)
    print(validated, flush=True)
    about = {"epsilon": EPSILON, "delta": DELTA, "max_grad_norm": NORM, "batch": BATCH, "epochs": EPOCHS}
    results = search(partial(private), ARMS, LRS, options.out, options.jobs, about=about)
    draw(results, options.out / "privacy.png")
    conclude(options.out, "python -m experiments.privacy", __doc__, f"{validated}\n\n{table(results)}")


if __name__ == "__main__":
    main()
