"""Runs in processes of their own: several at once, and each one's peak memory is its own."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from nfnets.errors import UserError
from nfnets.train import hardware
from nfnets.train.config import RunConfig
from nfnets.train.loop import engine
from nfnets.train.loop.folder import InUse, in_use, owned
from nfnets.train.loop.interrupts import TERMINATED

OnRow = Callable[["Task", dict[str, Any]], None]
Ready = Callable[[], Sequence["Task"]]
"""The tasks that are left and may start now, in order; none when everything is done."""

# Seconds between looks at what other processes have finished meanwhile.
LOOK = 1.0

# A forked server has these imported once for all runs. (A plain fork would copy threads' locks and CUDA's state.)
PRELOADED = [
    "nfnets.train.loop.engine",
    "nfnets.convert",
    "nfnets.agc",
    "nfnets.models",
    "timm.utils",
    "torchvision",
    "sklearn.datasets",
]


@dataclass(frozen=True)
class Task:
    """A run and where it lives."""

    config: RunConfig
    folder: Path
    test: bool = True
    """Whether the test split is read at the end."""


def here(
    ready: Ready, begin: Callable[[Task], None], on_row: OnRow, patient: bool = True
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Run one after the other in this process; yields each task with its result.

    Args:
        ready: Asked again after every task.
        begin: Called when one starts.
        on_row: Called with every logged row of a run.
        patient: Wait for tasks that other processes work on; else stop when none but those is left.
    """
    while tasks := ready():
        for task in tasks:
            if in_use(task.folder):
                continue
            cores = reserved(task)
            if cores is None:
                time.sleep(LOOK)
                break
            begin(task)
            try:
                with cores:
                    result = engine.run(
                        task.config,
                        task.folder,
                        on_step=lambda row, task=task: on_row(task, row),
                        test=task.test,
                    )
            except InUse:
                continue
            yield task, result
            break
        else:
            if not patient:
                return
            time.sleep(LOOK)


def apart(
    ready: Ready, begin: Callable[[Task], None], on_row: OnRow, jobs: int, patient: bool = True
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Run `jobs` at a time in processes of their own; yields each task with its result as it ends.

    No more of them than the machine has cores for, together with those of other processes that share the sweep.

    Args:
        ready: Asked again whenever there is room for another task.
        begin: Called when one starts.
        on_row: Called with every logged row of a run.
        jobs: Processes at once, at least 1.
        patient: Wait for tasks that other processes work on; else stop when none but those is left.

    Yields:
        Task and result, in the order in which they end.

    Raises:
        UserError: a run's own, or one that says how a process died.
        KeyboardInterrupt, SystemExit(143): after all processes have saved their state.
    """
    running: dict[Connection, _Running] = {}
    tasks: Sequence[Task] = ()
    looked, crowded = -math.inf, False
    with _passed_on(running):
        try:
            while True:
                if len(running) < jobs and time.monotonic() - looked >= LOOK:
                    looked, tasks, crowded = time.monotonic(), ready(), False
                    mine = {run.task.folder for run in running.values()}
                    for task in tasks:
                        if len(running) == jobs:
                            break
                        if task.folder in mine or in_use(task.folder):
                            continue
                        cores = reserved(task)
                        if crowded := cores is None:
                            break
                        pipe, process = start(_work, task)
                        running[pipe] = _Running(task, process, cores)
                        begin(task)
                if not running:
                    if not tasks or (not patient and not crowded):
                        return
                    time.sleep(LOOK)
                for pipe in wait(list(running), LOOK):
                    assert isinstance(pipe, Connection)
                    task, process, cores = running[pipe]
                    try:
                        kind, content = pipe.recv()
                    except EOFError:
                        process.join()
                        raise _death(task, process.exitcode) from None
                    if kind == "row":
                        on_row(task, content)
                        continue
                    process.join()
                    cores.close()
                    del running[pipe]
                    looked = -math.inf
                    if kind == "error":
                        raise content
                    if kind == "result":
                        yield task, content
        finally:
            for _, process, _ in running.values():
                if process.pid is not None and process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)
            for _, process, cores in running.values():
                process.join()
                cores.close()


class _Running(NamedTuple):
    task: Task
    process: BaseProcess
    cores: ExitStack


def reserved(task: Task) -> ExitStack | None:
    """As many of this machine's cores as a run has threads, until closed; None where other runs of the sweep, whoever
    trains them, have too many of them. A run on a GPU needs none.

    Args:
        task: its folder's neighbors are the sweep's other runs.
    """
    held = ExitStack()
    if hardware.resolve(task.config.device).type != "cpu":
        return held
    numbers = hardware.core_numbers()
    left = min(task.config.threads or len(numbers), len(numbers))
    cores = task.folder.parent / ".cores"
    try:
        with owned(cores):  # one at a time, or two would take half of them each
            for number in numbers:
                with suppress(InUse):
                    held.enter_context(owned(cores / f"{platform.node()}-{number}"))
                    left -= 1
                if not left:
                    return held
    except InUse:
        pass
    held.close()
    return None


def server() -> ForkServerContext:
    """What starts processes that train: copies of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(work: Callable[..., None], *args: Any, daemon: bool = False) -> tuple[Connection, BaseProcess]:
    """Begin a process of its own that calls `work(*args, pipe)`.

    Args:
        work: A function of a module; sends through the pipe.
        *args: Can be pickled.
        daemon: Ends with this process; then it may have no processes of its own.

    Returns:
        The end of the pipe to read here, and the process. Reading gives EOFError where it died.
    """
    context = server()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*args, theirs), daemon=daemon)
    process.start()
    theirs.close()
    return ours, process


@contextmanager
def alone() -> Iterator[None]:
    """While entered, a process that `torchrun` started trains by itself.

    The ranks of a sweep share its runs, not a run's batches. LOCAL_RANK stays: each rank has a GPU of its own.
    """
    before = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _work(task: Task, pipe: Connection) -> None:
    """A worker's whole life."""
    # Out of the terminal's group: Ctrl-C goes to the parent, which passes on one signal. Two would mean "at once".
    os.setpgrp()
    try:
        result = engine.run(
            task.config, task.folder, on_step=lambda row: pipe.send(("row", row)), test=task.test
        )
        pipe.send(("result", result))
    except InUse:
        pipe.send(("in use", None))
    except UserError as error:
        pipe.send(("error", UserError(str(error))))
    except (KeyboardInterrupt, BrokenPipeError):  # saved, or the parent is gone: a traceback helps nobody
        os._exit(130)


def _death(task: Task, code: int | None) -> BaseException:
    if code == 130:
        return KeyboardInterrupt()
    if code == TERMINATED:
        return SystemExit(TERMINATED)
    how = (
        f"was killed by signal {-code} (out of memory?)"
        if code is not None and code < 0
        else f"ended with {code}"
    )
    return UserError(
        f"{task.folder}: its process {how}; the same command goes on from its checkpoint, with fewer --jobs if "
        "memory is short"
    )


@contextmanager
def _passed_on(running: dict[Connection, _Running]) -> Iterator[None]:
    """While entered, SIGTERM (a scheduler's, to this process alone) ends the workers too, once they have saved."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: handlers are not ours to set
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
