"""How long a sweep will take: a few real steps of every arm, times the steps that are left."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nfnets.errors import UserError
from nfnets.train.compare.cost import read_costs, timed
from nfnets.train.compare.experiment import settled, total_steps
from nfnets.train.compare.protocol import ExperimentConfig, Trial
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.hardware import resolve, threads
from nfnets.train.loop.arm import arm_model, first_images
from nfnets.train.loop.folder import finished

STEPS = 4


@dataclass(frozen=True)
class Planned:
    """One run of a sweep that has yet to happen, or has."""

    arm: str
    batch_size: int
    lr: float | None
    """None: the search decides it."""
    seed: int
    steps: int
    seconds: float
    finished: bool


def dry_run(config: ExperimentConfig, data: Data, out: Path) -> list[Planned]:
    """Every run of the sweep with its estimated training time; nothing is written.

    Args:
        config: The experiment.
        data: Its data set.
        out: Its directory, where finished runs count as done; what a sweep there measured is not timed again.

    Returns:
        The runs, in the order of `ExperimentConfig.planned`.
    """
    config = settled(config, out)
    speed = {
        (cost.arm, cost.batch_size): statistics.median(cost.step_seconds) for cost in read_costs(config, out)
    }
    planned = []
    for arm, batch_size, lr, seed in config.planned():
        rate = lr or config.candidates(config.arm(arm), batch_size)[0]
        trial = Trial(arm, batch_size, rate, seed)
        run = config.run_config(trial)
        steps = total_steps(run, data)
        over = lr is not None and _is_finished(out / "runs" / trial.folder, run)
        if not over and (arm, batch_size) not in speed:
            speed[arm, batch_size] = seconds_per_step(run, data)
        seconds = 0.0 if over else steps * speed[arm, batch_size]
        planned.append(Planned(arm, batch_size, lr, seed, steps, seconds, over))
    return planned


def _is_finished(folder: Path, run: RunConfig) -> bool:
    try:
        return finished(folder, run) is not None
    except UserError:
        return False


def seconds_per_step(run: RunConfig, data: Data) -> float:
    """Median time of a forward and a backward pass of the arm's own model on a batch of its own, warmed up."""
    device = resolve(run.device)
    with threads(run.threads):
        model = arm_model(run, data).to(device)
        images = first_images(run, data).to(device)
        labels = torch.arange(len(images), device=device) % data.num_classes

        def step() -> Tensor:
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss.detach()

        return statistics.median(timed(step, 1 + STEPS, 1 + STEPS)[1:])
