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
from rich.console import Console

from nfnets.train import hardware
from nfnets.train.compare import Event, ExperimentConfig, cost, experiment, run_experiment, summary, workers
from nfnets.train.compare import sweep as sweeps
from nfnets.train.compare.experiment import read_experiment

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
    # No daemon: it has children of its own.
    process = workers.server().Process(target=with_forks, args=(target, *args))
    process.start()
    return process


def with_forks(target: Any, *args: Any) -> None:
    """A child forks its own, which has imported everything; a server anew would cost more than what is trained."""
    workers.server = lambda: multiprocessing.get_context("fork")
    target(*args)


def compare(out: Path, jobs: int, die_after: int | None = None) -> None:
    """The whole command; dies at once, as by `kill -9`, after so many rows of logs."""
    workers.LOOK = 0.1
    cost.measure_all = lambda config, out: []  # clocks are not what is looked at here
    steps = 0
    run = experiment.run_experiment

    def watched(*args: Any, watch: Any, **named: Any) -> Any:
        def counts(event: Event) -> None:
            nonlocal steps
            watch(event)
            steps += event.kind == "step"
            if steps == die_after:
                os.kill(os.getpid(), signal.SIGKILL)

        return run(*args, watch=counts, **named)

    sweeps.run_experiment = watched
    there = out / "experiment.json"
    config = read_experiment(there) if there.exists() else ExperimentConfig.create(**FIELDS)
    sweeps.sweep(config, out, Console(quiet=True), jobs=jobs, command="it")


def outcome(out: Path) -> dict[str, Any]:
    """What a kill must not change: numbers, verdicts, weights, logs, signals."""
    results = summary.read_results(out)
    assert results["complete"]
    runs = [{k: v for k, v in run.items() if k not in MEASURED} for run in results["runs"]]
    rest = {k: v for k, v in results.items() if k not in ("costs", "runs", "jobs")}
    files = [*out.glob("runs/*/*.safetensors"), *out.glob("runs/*/log.jsonl"), *out.glob("**/signal*.json")]
    return {
        "results": rest | {"runs": runs},
        "verdicts": [verdict.text for verdict in summary.summarize(results).verdicts],
        "files": {str(path.relative_to(out)): path.read_bytes() for path in files},
    }


def finish(process: BaseProcess, code: int) -> None:
    process.join(300)
    assert process.exitcode == code


def test_a_killed_comparison_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((cost, "measure_all"), (sweeps, "run_experiment"), (workers, "LOOK")):
        monkeypatch.setattr(module, name, getattr(module, name))  # for `compare` in this process
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    compare(tmp_path / "whole", 1)
    whole, out = outcome(tmp_path / "whole"), tmp_path / "killed"
    assert len(whole["results"]["runs"]) == 6
    assert len([name for name in whole["files"] if name.endswith("model.safetensors")]) == 6
    for jobs, rows in ((1, 5), (2, 40)):  # within the first run; in the middle of two others
        finish(child(compare, out, jobs, rows), -signal.SIGKILL)
        assert not (out / "index.html").exists()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # another shell
    with hardware.threads(2):
        compare(out, 2)
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
    most = workers.server().Value("i", 0)
    processes = [child(take_part, tmp_path, most) for _ in range(2)]
    for process in processes:
        finish(process, 0)
    # Four would be asked for, of one thread each, on two cores.
    assert most.value == 2
    assert json.loads((tmp_path / "results.json").read_text())["complete"]
