"""Worker processes that are watched: one model a task, killed at a limit of memory or processor time, then replaced."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # else importing it, and with it torch, would slow every start
    from benchmarks.zoo.build import Entry

GIB = 2**30
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

Run = Callable[["Entry", Sequence[str], Callable[[dict[str, Any]], None]], None]
Task = tuple["Entry", list[str]]


@dataclass
class Limits:
    """Of one worker, for one method of one model."""

    seconds: float = 300.0
    """Processor time, so that a busy machine kills nothing."""
    memory: float = 7.5 * GIB
    """Resident bytes."""
    tasks: int = 20
    """Before a worker is replaced: allocators keep what they once had."""


@dataclass
class Worker:
    """A process and what it is doing."""

    process: Any
    channel: Connection
    task: Task | None = None
    started: str = ""
    since: float = 0.0
    done: set[str] = field(default_factory=set)
    tasks: int = 0


class Pool:
    """Runs tasks in spawned processes; `on_record` gets every record, also of what was killed."""

    def __init__(self, run: Run, workers: int, limits: Limits, on_record: Callable[[dict[str, Any]], None]):
        self.run = run
        self.count = workers
        self.limits = limits
        self.on_record = on_record
        self.peak = 0
        """Largest resident memory of all workers together that was seen, in bytes."""

    def map(
        self, tasks: Sequence[Task], on_start: Callable[[str, str], None] = lambda model, method: None
    ) -> None:
        """Run all tasks in order of the queue; returns when the last has ended."""
        queue: deque[Task] = deque(tasks)
        workers: list[Worker] = []
        try:
            while queue or any(w.task for w in workers):
                while queue and len(workers) < self.count:
                    workers.append(self._spawn())
                for worker in workers:
                    if worker.task is None and queue:
                        self._give(worker, queue.popleft())
                for channel in wait([w.channel for w in workers], timeout=0.5):
                    worker = next(w for w in workers if w.channel is channel)
                    self._listen(worker, queue, on_start)
                self._watch(workers, queue)
                workers = [w for w in workers if w.process.is_alive() or w.task]
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()

    def _spawn(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self.run), daemon=True)
        process.start()
        there.close()
        return Worker(process, here)

    def _give(self, worker: Worker, task: Task) -> None:
        worker.task, worker.started, worker.done, worker.since = (
            task,
            "",
            set(),
            cpu_seconds(worker.process.pid),
        )
        worker.tasks += 1
        worker.channel.send(task)

    def _listen(self, worker: Worker, queue: deque[Task], on_start: Callable[[str, str], None]) -> None:
        try:
            message = worker.channel.recv()
        except (EOFError, ConnectionResetError):
            self._lost(worker, queue, "the process died")
            return
        if message is None:
            worker.task = None
            if worker.tasks >= self.limits.tasks:
                worker.process.kill()
                worker.process.join()
        elif "starts" in message:
            worker.started, worker.since = message["starts"], cpu_seconds(worker.process.pid)
            on_start(message["model"], worker.started)
        else:
            worker.done.add(message["method"])
            self.on_record(message)

    def _watch(self, workers: list[Worker], queue: deque[Task]) -> None:
        memory = {id(w): resident(w.process.pid) for w in workers}
        self.peak = max(self.peak, sum(memory.values()))
        for worker in workers:
            if worker.task is None:
                continue
            spent = (
                cpu_seconds(worker.process.pid) - worker.since if worker.started else 0.0
            )  # imports are free
            if memory[id(worker)] > self.limits.memory:
                self._lost(worker, queue, f"more than {self.limits.memory / GIB:.1f} GiB of memory")
            elif spent > self.limits.seconds:
                self._lost(worker, queue, f"more than {self.limits.seconds:.0f} s of processor time")

    def _lost(self, worker: Worker, queue: deque[Task], reason: str) -> None:
        """Report what a worker was doing as killed and put the rest of its task back."""
        if worker.process.is_alive():
            os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.join()
        worker.channel.close()
        assert worker.task is not None
        entry, methods = worker.task
        worker.task = None
        during = worker.started
        left = [m for m in methods if m not in worker.done]
        killed = [during] if during in left else left  # the model itself cannot be built or run: nothing can
        for method in killed:
            where = "" if method == during else "the BatchNorm model itself: "
            record = {"model": entry.key, "method": method, "outcome": "killed", "reason": where + reason}
            self.on_record(record | {"checks": {}, "seconds": 0.0})
        if rest := [m for m in left if m not in killed]:
            queue.appendleft((entry, rest))


def _serve(channel: Connection, run: Run) -> None:
    while True:
        try:
            entry, methods = channel.recv()
        except EOFError:
            return
        run(entry, methods, channel.send)
        channel.send(None)


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used; 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as status:
            fields = status.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident(pid: int) -> int:
    """Resident memory of a process in bytes, without what the system can read from a file again; 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as status:
            _, resident, files, *_ = map(int, status.read().split())
            return (resident - files) * resource.getpagesize()
    except OSError:
        return 0
