"""What a training step costs: speed and memory of every arm, measured apart from evaluation and compilation."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nfnets.errors import UserError
from nfnets.plain import read_json
from nfnets.train import hardware
from nfnets.train.compare import workers
from nfnets.train.compare.experiment import write_json
from nfnets.train.compare.protocol import ExperimentConfig, Trial, slug
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.loop.session import prepare, session

WARMUP, LEAST, MOST = 3, 3, 20
SECONDS = 5.0


@dataclass(frozen=True)
class Cost:
    """One arm at one batch size, alone in a process of its own."""

    arm: str
    batch_size: int
    first_step_seconds: float
    """With what happens only once: compilation, allocation, the choice of algorithms."""
    step_seconds: tuple[float, ...]
    """Of the steps after the warm-up, data and optimizer included."""
    images_per_second: float
    """Batch size over the median of them."""
    peak_memory_mb: float
    """What training adds: torch's allocations on a GPU; on a CPU, resident memory over that before the model."""


def measure(run: RunConfig) -> dict[str, Any]:
    """Steps of a run as the engine takes them, timed one by one; nothing is written.

    Args:
        run: The configuration.

    Returns:
        The fields of `Cost` but arm and batch size.
    """
    with session(run) as processes:
        device = processes.device
        data = load(run, device)
        before = _resident_mb()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _, batches, trainer = prepare(run, data, processes)
        count = WARMUP + MOST
        # The schedule may be shorter than what is measured: the same epochs come again.
        stream = _again(lambda: batches.from_step(0, trainer.total), count)
        times = timed(lambda: trainer.step(next(stream))[0], WARMUP + LEAST, count)
    peak = hardware.peak_memory_mb(device)
    if device.type == "cpu":
        peak = max(0.0, peak - before)
    return {
        "first_step_seconds": times[0],
        "step_seconds": tuple(times[WARMUP:]),
        "images_per_second": run.batch_size / statistics.median(times[WARMUP:]),
        "peak_memory_mb": peak,
    }


def timed(step: Callable[[], Tensor], least: int, most: int) -> list[float]:
    """Seconds that steps take, one by one, the first ones with what happens only once.

    Args:
        step: Takes one, and returns its loss; reading that waits for a GPU.
        least: So many, however long they take.
        most: So many, as long as they take no more than 5 seconds in all.
    """
    times: list[float] = []
    while len(times) < least or (len(times) < most and sum(times) <= SECONDS):
        started = time.perf_counter()
        step().item()
        times.append(time.perf_counter() - started)
    return times


def _again(make: Callable[[], Iterator[Any]], count: int) -> Iterator[Any]:
    given = 0
    while given < count:
        for batch in make():
            yield batch
            given += 1


def _resident_mb() -> float:
    """Resident memory now; its peak starts from here, where the kernel lets it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return hardware.resident_mb(peak=False)


def measure_all(config: ExperimentConfig, out: Path) -> list[Cost]:
    """The cost of every arm at every batch size, one after the other; what was measured before is read back.

    Args:
        config: The experiment.
        out: Its directory; the measurements are kept in `<out>/cost/`.

    Returns:
        One entry per arm and batch size.

    Raises:
        UserError: a configuration that cannot train.
    """
    for arm in config.arms:
        for batch_size in config.batch_sizes:
            file = _file(out, arm.name, batch_size)
            if not file.is_file():
                lr = config.candidates(arm, batch_size)[0]
                run = config.run_config(Trial(arm.name, batch_size, lr, config.seeds[0]))
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, plain(Cost(arm.name, batch_size, **_in_a_process(run))))
    return read_costs(config, out)


def plain(entry: Cost) -> dict[str, Any]:
    """The fields as JSON has them."""
    return asdict(entry) | {"step_seconds": list(entry.step_seconds)}


def _file(out: Path, arm: str, batch_size: int) -> Path:
    return out / "cost" / f"{slug(arm)}-b{batch_size}.json"


def read_costs(config: ExperimentConfig, out: Path) -> list[Cost]:
    """What `measure_all` left."""
    found = []
    for batch_size in config.batch_sizes:
        for arm in config.arms:
            file = _file(out, arm.name, batch_size)
            if file.is_file():
                fields = read_json(file, "what an arm's steps cost; delete it to measure again")
                try:
                    found.append(
                        Cost(**{**fields, "step_seconds": tuple(map(float, fields["step_seconds"]))})
                    )
                except (KeyError, TypeError, ValueError):
                    raise UserError(
                        f"{file}: not what an arm's steps cost; delete it to measure again"
                    ) from None
    return found


def _in_a_process(run: RunConfig) -> dict[str, Any]:
    ours, process = workers.start(_work, run, daemon=True)
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"measuring {run.model} at batch size {run.batch_size}: its process ended with {process.exitcode} "
            "(out of memory?); expected it to train; lower the batch size"
        ) from None
    finally:
        if process.is_alive():
            process.join(5)
            process.kill()
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _work(run: RunConfig, pipe: Connection) -> None:
    try:
        pipe.send(measure(run))
    except UserError as error:
        pipe.send(UserError(str(error)))
