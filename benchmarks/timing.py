"""Two things timed in turn, so that a busy machine slows both."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
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


def peak_mib(build: Callable[..., Callable[[], Any]], args: tuple[Any, ...], small: tuple[Any, ...]) -> float:
    """Memory in MiB that two runs of what `build(*args)` returns take at most, in a process of its own.

    What `build(*small)` returns runs before: code, tables and whatever else is loaded once is not counted. On a GPU the
    allocator's peak; on a CPU the growth of the resident set, with glibc's threshold fixed above which blocks are given
    back at once: left to itself it follows the blocks that are freed, and what the heap keeps differs by a tenth from
    run to run.
    """
    threshold = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(threshold)
    os.environ[threshold] = str(256 * 1024)  # read when a process starts
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_peak, (build, args, small))
    finally:
        os.environ.pop(threshold) if before is None else os.environ.update({threshold: before})


def _peak(build: Callable[..., Callable[[], Any]], args: tuple[Any, ...], small: tuple[Any, ...]) -> float:
    build(*small)()
    run = build(*args)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run(), run()
        return torch.cuda.max_memory_allocated() / 2**20
    before = resident_mb(peak=False)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run(), run()
    return resident_mb(peak=True) - before
