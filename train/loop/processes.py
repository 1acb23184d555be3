"""The processes that `torchrun` started for one run, or this one alone."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.data.splits import Unreadable


def world_size() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def must_be_as_many(folder: Path, begun: int) -> None:
    """A UserError where a run's processes are not as many as it began with, on which its sums depend."""
    if begun != world_size():
        raise UserError(
            f"{folder}: begun by {begun} process{'es' if begun > 1 else ''}, now {world_size()}; "
            f"go on with torchrun --nproc_per_node {begun}"
        )


class Processes:
    """This process's rank among `size`; with one process every operation is the identity.

    Args:
        device: nccl for cuda, gloo for cpu.

    Example:
        >>> alone = Processes(torch.device("cpu"))
        >>> alone.rank, alone.size, alone.first, alone.largest(3)
        (0, 1, True, 3)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.size = world_size()
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        self.first = self.rank == 0
        if self.size > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(distributed.destroy_process_group)

    def check(self, config: RunConfig) -> None:
        """A UserError where a batch cannot be split evenly over micro-batches and processes."""
        parts = config.accumulation * self.size
        if config.batch_size % parts:
            raise UserError(
                f"batch_size={config.batch_size}: expected a multiple of accumulation × processes = "
                f"{config.accumulation} × {self.size}"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where another process is lost this one can only stop: a UserError, and not gloo's or NCCL's traceback."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
            if self.size == 1 or not lost:
                raise
            raise UserError(
                f"one of the {self.size} processes of this run has ended, and the others with it; the same command "
                "goes on from the last checkpoint"
            ) from error

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training: its gradients are averaged over the processes."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes, in place."""
        return self.sum(tensor).div_(self.size) if self.size > 1 else tensor

    def largest(self, number: int) -> int:
        """The largest of every process's number."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return int(tensor)

    def unite(self, unreadable: Unreadable) -> None:
        """Give every process what any of them could not read."""
        if self.size > 1:
            found: list[Any] = [None] * self.size
            distributed.all_gather_object(found, unreadable.found)
            for one in found:
                unreadable.merge(one)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers, whose running statistics are those that are saved."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def first_says(self, value: Any) -> Any:
        """The first process's value, in every process; also waits for all of them."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, 0, device=self.device)
        return box[0]
