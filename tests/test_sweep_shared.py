"""Several processes share one sweep: no run twice, and the same results as one process gives."""

from __future__ import annotations

import json
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from nfnets.train.compare import Event, ExperimentConfig, run_experiment, workers
from nfnets.train.loop import folder as folders

FIELDS: dict[str, Any] = {
    "run": {
        "model": "bn_resnet8_cifar",
        "data": "digits",
        "epochs": 2,
        "train_limit": 200,
        "threads": 1,
        "checkpoint_every": 1,
    },
    "arms": [{"name": "bn", "method": "bn"}, {"name": "nf", "method": "nf"}],
    "seeds": [0, 1],
    "lrs": [0.05, 0.1],
    "batch_sizes": [32],
}
TIMING = ("train_seconds", "images_per_second", "peak_memory_mb")


def take_part(out: Path, name: str, environment: dict[str, str], die_after: int | None) -> None:
    """One of the processes; writes which steps of which runs it trained, and what it got in the end."""
    os.environ.update(environment)
    workers.LOOK = 0.1
    torch.set_num_threads(1)
    trained: list[tuple[str, int]] = []

    def watch(event: Event) -> None:
        if event.kind == "step" and "split" not in event.row:
            trained.append((event.trial.folder, event.row["step"]))
            if len(trained) == die_after:
                (out.parent / f"{name}.json").write_text(json.dumps([trained, None]))
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)  # nobody is done before the others have come

    results = run_experiment(ExperimentConfig.create(**FIELDS), out, watch=watch)
    assert os.environ.get("WORLD_SIZE") == environment.get("WORLD_SIZE")
    (out.parent / f"{name}.json").write_text(json.dumps([trained, results]))


def start(
    out: Path, name: str, environment: dict[str, str] | None = None, die_after: int | None = None
) -> BaseProcess:
    process = workers.server().Process(
        target=take_part, args=(out, name, environment or {}, die_after), daemon=True
    )
    process.start()
    return process


def report(out: Path, name: str) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    trained, results = json.loads((out.parent / f"{name}.json").read_text())
    return [(folder, step) for folder, step in trained], results


def without_timing(results: dict[str, Any]) -> dict[str, Any]:
    runs = [{k: v for k, v in run.items() if k not in TIMING} for run in results["runs"]]
    return {**results, "runs": runs}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone") / "sweep"
    process = start(out, "alone")
    process.join(300)
    trained, results = report(out, "alone")
    assert results["complete"]
    assert len(set(trained)) == len(trained) == 10 * 6, "2 arms × (2 rates + 1 more seed) of 10 steps"
    return without_timing(results)


def test_three_processes_share_the_runs(tmp_path: Path, alone: dict[str, Any]) -> None:
    out = tmp_path / "sweep"
    # As torchrun's ranks, which must not join into one run.
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
        for rank in range(3)
    ]
    processes = [start(out, f"rank{r}", environment) for r, environment in enumerate(ranks)]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    trained = []
    for rank in range(3):
        mine, results = report(out, f"rank{rank}")
        trained += mine
        assert without_timing(results) == alone, "everybody waits for everybody"
    assert len(trained) == len(set(trained)) == 60, "every step of every run was trained once"
    assert without_timing(json.loads((out / "results.json").read_text())) == alone


def test_who_dies_is_replaced(tmp_path: Path, alone: dict[str, Any]) -> None:
    out = tmp_path / "sweep"
    processes = [start(out, "victim", die_after=5), start(out, "heir")]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0]
    victim, _ = report(out, "victim")
    heir, results = report(out, "heir")
    assert without_timing(results) == alone
    assert len(set(victim + heir)) == 60
    # Rows reach a watcher after they were logged; a checkpoint may be a step behind, but not the start.
    cut = victim[-1][0]
    assert 1 < min(step for folder, step in heir if folder == cut) <= 6
    log = (out / "runs" / cut / "log.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, log) if "split" not in row]
    assert steps == list(range(1, 11))


def test_the_impatient_leave_what_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK", 0.05)
    config = ExperimentConfig.create(**FIELDS | {"lrs": [0.1]})
    held = tmp_path / "runs" / "nf-b32-lr0.1-s1"
    begun: list[str] = []

    def watch(event: Event) -> None:
        if event.kind == "begin":
            begun.append(event.trial.folder)

    with folders.owned(held):
        for jobs in (0, 1):
            results = run_experiment(config, tmp_path, patient=False, watch=watch, jobs=jobs)
            assert not results["complete"]
            assert [run["folder"] for run in results["runs"]] == [
                "runs/bn-b32-lr0.1-s0",
                "runs/nf-b32-lr0.1-s0",
                "runs/bn-b32-lr0.1-s1",
            ]
    assert len(begun) == len(set(begun)) == 3
    assert run_experiment(config, tmp_path, patient=False)["complete"]
