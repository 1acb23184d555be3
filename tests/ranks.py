"""Two gloo processes that do one piece of work together, for tests of what is distributed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nfnets.train.compare import workers

WORLD = 2

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def on_ranks(work: Callable[[int, str], None], folder: Path) -> None:
    """Run work(rank, folder) in each process of one group; the first error of any is raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        workers.server()  # which the next line starts them by
        start = torch.multiprocessing.start_processes
        start(_member, args=(work, str(folder)), nprocs=WORLD, start_method="forkserver")


def _member(rank: int, work: Callable[[int, str], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    work(rank, folder)
    dist.barrier()
    # Not the interpreter's own way out: a DDP model keeps the group's threads alive beyond
    # destroy_process_group, and one that still holds a tensor when the interpreter is torn down aborts the process
    # ("terminate called without an active exception", pytorch/pytorch#179291).
    os._exit(0)
