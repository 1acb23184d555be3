"""What a run and a learning-rate range test begin with: the device as it should be, the batches, the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from nfnets.train import hardware
from nfnets.train.augment.pipeline import Augmenter, augmenter
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.loop.arm import arm_model
from nfnets.train.loop.order import Batches
from nfnets.train.loop.processes import Processes
from nfnets.train.loop.trainer import Trainer
from nfnets.train.models import check_output


@contextmanager
def session(config: RunConfig) -> Iterator[Processes]:
    """The configured device, its deterministic algorithms and the number of threads, while the context lasts."""
    device = hardware.resolve(config.device)
    with hardware.threads(config.threads), _deterministic(device):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        processes = Processes(device)
        processes.check(config)
        torch.set_num_threads(processes.first_says(torch.get_num_threads()))  # machines may differ
        with processes.together():
            yield processes


def prepare(
    config: RunConfig, data: Data, processes: Processes, rate: Callable[[int], float] | None = None
) -> tuple[Augmenter, Batches, Trainer]:
    """The arm's model on its device, checked on the data, with all that trains it.

    Args:
        config: of the run.
        data: loaded for it.
        processes: of the session.
        rate: the learning rate of a step, in place of the configured schedule.

    Raises:
        UserError: for a model or a method that does not fit, and a batch larger than the data.
    """
    augment = augmenter(data, config)
    batches = Batches(data, config, augment, processes)
    model = arm_model(config, data).to(processes.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    micro = config.batch_size // (config.accumulation * processes.size)
    check_output(model, augment.normalize(data.train.first(micro)), data.num_classes, config.model)
    return augment, batches, Trainer(model, config, batches.per_epoch, data.num_classes, processes, rate)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """cuDNN's deterministic algorithms, without its timing-based choice among them."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
