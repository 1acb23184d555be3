"""What two other tools show of the planted faults: fastai's ActivationStats and cockpit's instruments, on the MLP.

    pip install fastai cockpit-for-pytorch "setuptools<81"    # in an environment of their own
    python tests/planted_peers.py                             # the table of docs/signal.md

Neither says whether a net is sick, or where. Of a fault each is given what its user has not: the healthy twin of the
same seed. Shown is the number that differs most from the twin's, and where.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from planted_faults import FAULTS, Subject, first_of, report_of
from torch import nn

import nfnets

STEPS, NET = 9, "MLP"
SHOWN = (
    "NaN in one channel",
    "one layer × 3",
    "one layer × 30",
    "90 % of a layer dead",
    "gain missing in all",
    "inputs nearly the same",
    "inputs 0..255",
    "inputs divided by 255 twice",
    "trunk detached",
    "frozen layer",
    "units of a layer identical",
    "softmax before the loss's own",
    "head of zeros",
    "training: AGC 100 × too small",
    "training: rate × 1e-5",
    "training: rate × 30",
    "training: NaN in the loss",
)
Numbers = Mapping[str, float]


def planted(fault: str | None) -> tuple[Subject, torch.Tensor, torch.Tensor]:
    s = Subject(NET)
    if fault is not None:
        with torch.no_grad():
            FAULTS[fault](s)
    return s, s.inputs[:32], torch.arange(32) % 10


def rate_of(s: Subject) -> float:
    return s.net.rate * s.training.get("lr", 1.0)


def optimizer_of(s: Subject) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(s.model.parameters(), lr=rate_of(s), momentum=0.9)
    if clipping := s.training.get("clipping"):
        nfnets.attach_agc(optimizer, s.model, clipping=clipping, exclude=s.layers()[-1])
    return optimizer


def by_fastai(fault: str | None, step: int) -> Numbers:
    """Mean, deviation and share near zero of each layer's output at a step."""
    from fastai.callback.hook import ActivationStats
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    s, x, y = planted(fault)
    poison = math.nan if s.training.get("poison") else 1.0
    batches = [(a, b) for _ in range(STEPS) for a, b in zip(x, y, strict=True)]
    dls = DataLoaders(*(DataLoader(batches, bs=len(x), shuffle=False) for _ in range(2)))
    stats = ActivationStats(modules=s.layers())
    learner = Learner(
        dls,
        s.model,
        loss_func=lambda out, target: F.cross_entropy(out, target) * poison,
        opt_func=lambda params, **_: OptimWrapper(opt=optimizer_of(s)),
        cbs=[stats],
    )
    learner.logger = lambda *_: None
    learner.fit(1, lr=rate_of(s))
    names = {id(m): n for n, m in s.model.named_modules()}
    found = {}
    for i, layer in enumerate(s.layers()):
        for what, values in zip(("mean", "std", "near zero"), stats.layer_stats(i), strict=True):
            found[f"{what} of {names[id(layer)]}"] = values[step]
    return found


def by_cockpit(fault: str | None, step: int) -> Numbers:
    """The instruments of its configuration `economy` at a step; several numbers by their norm."""
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.utils.configuration import configuration

    s, x, y = planted(fault)
    poison = math.nan if s.training.get("poison") else 1.0
    model, loss_of = extend(s.model), extend(nn.CrossEntropyLoss())
    optimizer = optimizer_of(s)
    instruments = Cockpit([p for p in model.parameters() if p.requires_grad], configuration("economy"))
    for at in range(STEPS):
        optimizer.zero_grad()
        out = model(x)
        loss = loss_of(out, y) * poison
        each = F.cross_entropy(out, y, reduction="none") * poison
        info = {"batch_size": len(x), "individual_losses": each, "loss": loss, "optimizer": optimizer}
        with instruments(at, info=info):
            loss.backward(create_graph=instruments.create_graph(at))
        optimizer.step()
    found = {}
    for values in instruments.get_output().values():
        for what, value in values.items():
            if what != "GradHist1d" and (size := _size(value)) is not None:
                found.setdefault(what, []).append(size)
    return {what: sizes[min(step, len(sizes) - 1)] for what, sizes in found.items()}


def _size(value: Any) -> float | None:
    try:
        return float(torch.as_tensor(value, dtype=torch.float64).norm())
    except (TypeError, ValueError):
        return None


def apart(healthy: Numbers, sick: Numbers) -> str:
    """The number that differs by the largest factor."""

    def factor(name: str) -> float:
        a, b = abs(healthy[name]), abs(sick[name])
        if not math.isfinite(b):
            return math.inf
        return abs(math.log(max(b, 1e-12) / max(a, 1e-12)))

    shared = [n for n in healthy if n in sick and math.isfinite(healthy[n])]
    # A mean near zero changes by any factor.
    name = max((n for n in shared if not n.startswith("mean of")), key=factor, default=None)
    return "–" if name is None else f"{name}: {healthy[name]:.2g} → {sick[name]:.2g}"


def tried(by: Callable[[str | None, int], Numbers], fault: str) -> str:
    """A fault of the net shows at the first step, one of the training at the last."""
    step = STEPS - 1 if fault.startswith("training") else 0
    try:
        return apart(by(None, step), by(fault, step))
    except Exception as error:  # what a peer cannot run is a result, too
        return f"fails: {type(error).__name__}"


def main(faults: Iterable[str]) -> None:
    peers = {"ActivationStats": by_fastai, "cockpit": by_cockpit}
    for name, by in list(peers.items()):
        try:
            by(None, 0)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            del peers[name]
    print("| fault | nfnets begins with | " + " | ".join(peers) + " |\n|---|---|" + "---|" * len(peers))
    for fault in faults:
        _, report = report_of(fault, NET)
        verdict = report.check()
        ours = f"`{verdict.causes[0].rule}` at {first_of(report)}" if verdict.causes else "a note"
        cells = [tried(by, fault) for by in peers.values()]
        print(f"| {fault} | {ours} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:] or SHOWN)
