"""Two things timed in turn, so that a busy machine slows both."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nfnets.train.hardware import resident_mb


class Paired(NamedTuple):
    """Medians in milliseconds, and the median of the rounds' ratios ours / peer."""

    ours_ms: float
    peer_ms: float
    ratio: float


def seconds(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = 9, warmup: int = 2) -> Paired:
    """Time both `rounds` times in turn, who goes first changing every round.

    Example:
        >>> paired(lambda: sum(range(20_000)), lambda: sum(range(10_000))).ratio > 1
        True
    """
    for _ in range(warmup):
        ours(), peer()
    mine: list[float] = []
    theirs: list[float] = []
    for index in range(rounds):
        for run, times in ((ours, mine), (peer, theirs))[:: 1 if index % 2 else -1]:
            times.append(1e3 * seconds(run))
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return Paired(statistics.median(mine), statistics.median(theirs), statistics.median(ratios))


def peak_mib(build: Callable[..., Callable[[], Any]], *args: Any) -> float:
    """Memory in MiB that `build(*args)` and two runs of what it returns take at most, in a process of its own.

    On a GPU the allocator's peak; on a CPU the growth of the resident set.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (build, args))


def _peak(build: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> float:
    run = build(*args)
    if torch.cuda.is_available():
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    before = resident_mb(peak=False)
    for _ in range(2):
        run()
    return resident_mb(peak=True) - before
