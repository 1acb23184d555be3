"""Federated averaging over clients with skewed labels at a tiny batch size: `nf` against BatchNorm, and FedBN.

    python -m experiments.federated [--out runs/federated] [--jobs 2]

A simulation on one machine after FedWon (arXiv 2306.06879): 5 clients hold digits (1,294 training images of 8×8
pixels) with label shares drawn from a Dirichlet distribution; in each of 8 rounds every client trains ResNet-8 for
one epoch by plain SGD at batch 4, 2 or 1, the converted net with its recipe's adaptive clipping, and the server
averages their states, weighted by their images, running statistics included. The conversion measures on noise, so that
no image leaves a client. FedBN (arXiv 2102.07623) averages everything but what belongs to norm layers, which stays
with each client; it is made for clients of different domains, and these differ in labels only. It is evaluated as the
mean over the clients' nets. Four learning rates on validation data with a tuning seed, then three paired seeds: each
draws its clients anew. About 30 core minutes. Interrupted, the same command goes on. Flower is not used: its engine
schedules clients over processes and machines, and five small ones in a row need no scheduler.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from nfnets.attached import attach
from nfnets.convert import convert
from nfnets.models import create_model
from nfnets.structure.laws import KINDS
from nfnets.structure.norms import norm_layers
from nfnets.train.config import RunConfig
from nfnets.train.data import load

CLIENTS, ROUNDS = 5, 8
LEAST = 4
"""Images that every client has."""
SETTINGS = ((0.1, 4), (0.3, 4), (0.1, 2), (0.1, 1))
"""Dirichlet's α and the local batch size; the more skewed clients at every size."""
LRS = (0.01, 0.03, 0.1, 0.3)
"""At batch 4; others by the square root."""
LABELS = {"bn": "BN", "nf": "NF", "fedbn": "FedBN"}
ARMS = tuple(LABELS)
COMMAND = "python -m experiments.federated"
Part = tuple[Tensor, Tensor]


def parts() -> tuple[Part, Part, Part]:
    """Training, validation and test images, normalized, with their labels."""
    data = load(RunConfig.create(data="digits"))

    def ready(split: Any) -> Part:
        return (split.images.float() / 255 - data.mean[0]) / data.std[0], split.labels

    return ready(data.train), ready(data.val), ready(data.test)


def clients(labels: Tensor, number: int, alpha: float, seed: int) -> list[Tensor]:
    """Each client's rows: class by class, shares from Dirichlet(α), drawn again while a client has fewer than `LEAST`.

    Example:
        >>> rows = clients(torch.arange(1000) % 10, 4, 0.5, seed=0)
        >>> sorted(torch.cat(rows).tolist()) == list(range(1000))
        True
    """
    random = np.random.default_rng(seed)
    while True:
        found: list[list[int]] = [[] for _ in range(number)]
        for label in labels.unique():
            rows = random.permutation(torch.nonzero(labels == label).flatten().numpy())
            cuts = np.cumsum(random.dirichlet([alpha] * number))[:-1] * len(rows)
            for mine, piece in zip(found, np.split(rows, cuts.astype(int)), strict=True):
                mine.extend(piece.tolist())
        if min(map(len, found)) >= LEAST:
            return [torch.tensor(rows) for rows in found]


def average(states: list[dict[str, Tensor]], weights: list[int]) -> dict[str, Tensor]:
    """FedAvg: Σ n_k · state_k / Σ n_k, of everything in floating point; counters from the first client.

    Example:
        >>> average([{"w": torch.tensor(0.0)}, {"w": torch.tensor(3.0)}], [2, 1])
        {'w': tensor(1.)}
    """
    total = sum(weights)
    return {
        name: sum(s[name] * (n / total) for s, n in zip(states, weights, strict=True))  # type: ignore[misc]
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }


def of_norm_layers(model: nn.Module) -> set[str]:
    """Names of the parameters and buffers of norm layers: what FedBN leaves with each client.

    Example:
        >>> sorted(of_norm_layers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))))
        ['1.num_batches_tracked', '1.running_mean', '1.running_var']
    """
    return {
        f"{path}.{name}" for path, norm in norm_layers(model, KINDS).items() for name in norm.state_dict()
    }


def accuracy(model: nn.Module, part: Part) -> float:
    """Of the model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return (model(part[0]).argmax(1) == part[1]).float().mean().item()


def local_epoch(
    model: nn.Module,
    part: Part,
    lr: float,
    batch: int,
    generator: torch.Generator,
    arm: str = "bn",
) -> None:
    """One client's pass over its images by plain SGD, clipped as the arm's method needs; whole batches only."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    attach(optimizer, model, batch, method=arm, head=None, verbose=False)
    order = torch.randperm(len(part[1]), generator=generator)
    for rows in order[: len(order) // batch * batch].split(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(part[0][rows]), part[1][rows])
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not finite")
        loss.backward()
        optimizer.step()


def federated(
    arm: str, lr: float, seed: int, tested: bool, alpha: float, batch: int, rounds: int = ROUNDS
) -> dict[str, Any]:
    """One whole simulation."""
    torch.set_num_threads(1)
    train, val, test = parts()
    torch.manual_seed(seed)
    model = create_model("bn_resnet8_cifar", in_chans=1)
    method = "nf" if arm == "nf" else "bn"
    if method == "nf":
        noise = torch.randn(256, *train[0].shape[1:])
        model = convert(model, noise, method=method, batch_size=batch)
    rows = clients(train[1], CLIENTS, alpha, seed)
    generator = torch.Generator().manual_seed(seed)
    kept = of_norm_layers(model) if arm == "fedbn" else set()
    nets = [copy.deepcopy(model) for _ in rows]
    judged = nets if kept else nets[:1]  # the others are all the same
    course = []
    try:
        for _ in range(rounds):
            for net, mine in zip(nets, rows, strict=True):
                local_epoch(net, (train[0][mine], train[1][mine]), lr, batch, generator, method)
            shared = average([net.state_dict() for net in nets], [len(mine) for mine in rows])
            for net in nets:
                net.load_state_dict({n: t for n, t in shared.items() if n not in kept}, strict=False)
            course.append(sum(accuracy(net, val) for net in judged) / len(judged))
    except FloatingPointError:
        return {"status": "diverged", "val_accuracy": 0.0, "test_accuracy": None, "course": course}
    return {
        "status": "done",
        "val_accuracy": course[-1],
        "test_accuracy": sum(accuracy(net, test) for net in judged) / len(judged) if tested else None,
        "course": course,
        "client_images": [len(mine) for mine in rows],
    }


Found = dict[tuple[float, int], dict[str, Any]]
"""Results by Dirichlet's α and the local batch size."""


def table(found: Found) -> str:
    """Test accuracy and the paired difference, as Markdown."""
    body = []
    for (alpha, batch), results in found.items():
        rates = {c["arm"]: c["lr"] for c in results["chosen"]}
        by_arm = {arm: accuracies(results, arm, 0) for arm in ARMS}
        body.append(
            [
                batch,
                alpha,
                *(f"{percent(values)} (lr {rates[arm]:g})" for arm, values in by_arm.items()),
                *(compared(by_arm["nf"], by_arm[other]) for other in ("bn", "fedbn")),
            ]
        )
    tested = [f"{label}, test %" for label in LABELS.values()]
    minus = ["NF − BN, points [95 %]", "NF − FedBN, points [95 %]"]
    return markdown(["local batch", "Dirichlet α", *tested, *minus], body)


def draw(found: Found, path: Path) -> None:
    """Validation accuracy of the averaged model over the rounds, every seed and the mean, a panel a setting."""
    figure, axes = panels(len(found), width=3.2 * len(found) + 1, height=3.4, sharey=True)
    for axis, ((alpha, batch), results) in zip(axes, found.items(), strict=True):
        for arm, color in zip(ARMS, COLORS, strict=False):
            courses = [
                r["course"]
                for r in results["runs"]
                if r["final"] and r["arm"] == arm and r["status"] == "done"
            ]
            for course in courses:
                axis.plot(range(1, len(course) + 1), course, color=color, alpha=0.35, lw=1)
            if courses:
                mean = np.mean(courses, axis=0)
                axis.plot(
                    range(1, len(mean) + 1),
                    mean,
                    color=color,
                    lw=2,
                    label=LABELS[arm],
                )
        axis.set_xlabel("round")
        axis.set_title(f"batch {batch}, Dirichlet({alpha:g})", fontsize=11)
        axis.legend(frameon=False, fontsize=9, loc="lower right")
        axis.set_ylim(0, 1)
    percent_axis(axes[0], "validation accuracy, averaged model")
    save(figure, path)


def main() -> None:
    options = arguments(__doc__, "runs/federated").parse_args()
    found: Found = {}
    for alpha, batch in SETTINGS:
        run = partial(federated, alpha=alpha, batch=batch)
        about = {
            "alpha": alpha,
            "clients": CLIENTS,
            "rounds": ROUNDS,
            "local_batch": batch,
            "command": COMMAND,
        }
        rates = [float(f"{lr * (batch / 4) ** 0.5:.3g}") for lr in LRS]
        out = options.out / f"b{batch}-alpha{alpha:g}"
        found[alpha, batch] = search(run, ARMS, rates, out, options.jobs, about=about)
        draw(found, options.out / "federated.png")
        conclude(options.out, COMMAND, __doc__, table(found))


if __name__ == "__main__":
    main()
