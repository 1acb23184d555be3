"""A comparison that was killed goes on to the end that it would have had; two processes share a machine's cores."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nfnets.train import hardware
from nfnets.train.compare import Event, ExperimentConfig, run_experiment, summary, workers
from nfnets.train.compare.experiment import read_experiment
from nfnets.train.compare.sweep import sweep

FIELDS: dict[str, Any] = {
    "run": {
        "model": "bn_resnet8_cifar",
        "data": "digits",
        "epochs": 2,
        "train_limit": 200,
        "checkpoint_every": 2,
        "device": "cpu",
    },
    "arms": [{"name": "bn", "method": "bn"}, {"name": "nf", "method": "nf", "ema_decay": 0.5}],
    "seeds": [0, 1],
    "lrs": [0.05, 0.1],
    "batch_sizes": [36],
}
# Clocks and memory; everything else must be the same, whoever died on the way.
MEASURED = ("train_seconds", "images_per_second", "peak_memory_mb")


def child(target: Any, *args: Any) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["nfnets.train.compare.sweep", "nfnets.convert", "sklearn.datasets", "timm.utils", "test_sweep_kills"]
    )
    process = context.Process(target=target, args=args)  # no daemon: it has children of its own
    process.start()
    return process


def compare(out: Path, jobs: int, threads: int, die_after: int | None = None) -> None:
    """The whole command, in a shell with so many threads; dies at once, as by `kill -9`, after so many logged steps."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    workers.LOOK = 0.1
    hardware.core_numbers = lambda: [0, 1]
    steps = 0
    if die_after is not None:
        watched = run_experiment

        def counted(*args: Any, watch: Any, **named: Any) -> Any:
            def dies(event: Event) -> None:
                nonlocal steps
                watch(event)
                steps += event.kind == "step"
                if steps == die_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            return watched(*args, watch=dies, **named)

        from nfnets.train.compare import sweep as module

        module.run_experiment = counted
    there = out / "experiment.json"
    config = read_experiment(there) if there.exists() else None
    sweep(config or ExperimentConfig.create(**FIELDS), out, Console(quiet=True), jobs=jobs, command="it")


def outcome(out: Path) -> dict[str, Any]:
    """What a kill must not change: numbers, verdicts, weights, logs, signals."""
    results = summary.read_results(out)
    assert results["complete"]
    runs = [{k: v for k, v in run.items() if k not in MEASURED} for run in results["runs"]]
    rest = {k: v for k, v in results.items() if k not in ("costs", "runs", "jobs")}
    files = [*out.glob("runs/*/*.safetensors"), *out.glob("runs/*/log.jsonl"), *out.glob("**/signal*.json")]
    return {
        "results": rest | {"runs": runs},
        "verdicts": [verdict.text for verdict in summary.verdicts(results)],
        "files": {str(path.relative_to(out)): path.read_bytes() for path in files},
    }


def finish(process: BaseProcess, code: int) -> None:
    process.join(300)
    assert process.exitcode == code


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole") / "out"
    finish(child(compare, out, 1, 1), 0)
    found = outcome(out)
    assert len(found["results"]["runs"]) == 6
    assert len([name for name in found["files"] if name.endswith("model.safetensors")]) == 6
    return found


@pytest.mark.parametrize(("jobs", "deaths"), [(1, (5, 40)), (2, (13,))])
def test_a_killed_comparison_goes_on_to_the_same_end(
    tmp_path: Path, whole: dict[str, Any], jobs: int, deaths: tuple[int, ...]
) -> None:
    out = tmp_path / "out"
    for number, steps in enumerate(deaths):
        finish(child(compare, out, jobs, 1 + bool(number), steps), -signal.SIGKILL)
        assert not (out / "index.html").exists()
    # Another shell, with other threads and another number of jobs.
    finish(child(compare, out, 3 - jobs, 2), 0)
    assert outcome(out) == whole
    assert (out / "index.html").is_file()
    assert not list(out.glob("runs/*/.tmp-*"))


def take_part(out: Path, most: Any) -> None:
    """Share a sweep, two runs at a time, and keep count of what everybody together trains at this moment."""
    workers.LOOK = 0.05
    hardware.core_numbers = lambda: [0, 1]

    def watch(event: Event) -> None:
        held = len(list(filter(locked, (out / "runs").glob("[!.]*/.lock"))))
        with most.get_lock():
            most.value = max(most.value, held)
        time.sleep(0.01)

    run_experiment(ExperimentConfig.create(**FIELDS | {"seeds": [0, 1, 2]}), out, watch=watch, jobs=2)


def locked(file: Path) -> bool:
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_two_processes_on_one_sweep_leave_each_other_the_cores(tmp_path: Path) -> None:
    most = multiprocessing.get_context("forkserver").Value("i", 0)
    processes = [child(take_part, tmp_path, most) for _ in range(2)]
    for process in processes:
        finish(process, 0)
    # Four would be asked for, of one thread each, on two cores.
    assert most.value == 2
    assert json.loads((tmp_path / "results.json").read_text())["complete"]
