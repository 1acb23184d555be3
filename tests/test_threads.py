"""Threads decide the last bits: they belong to a run's identity, and a sweep's runs all have as many."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nfnets.errors import UserError
from nfnets.train import hardware
from nfnets.train.compare import ExperimentConfig, run_experiment, workers
from nfnets.train.compare.estimate import dry_run
from nfnets.train.compare.experiment import settled
from nfnets.train.compare.workers import Task, reserved
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.loop import engine
from nfnets.train.loop.folder import CONFIG, RESULT

RUN: dict[str, Any] = {"model": "bn_resnet8_cifar", "train_limit": 120, "epochs": 1, "device": "cpu"}


def config(**fields: Any) -> RunConfig:
    return RunConfig.create(**{**RUN, "batch_size": 36, **fields})


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    """What a shell with OMP_NUM_THREADS gives torch."""
    with hardware.threads(request.param):
        yield request.param


def test_a_run_records_the_threads_it_was_not_told(tmp_path: Path, threads: int) -> None:
    result = engine.run(config(), tmp_path)
    assert result["config"]["threads"] == threads == result["hardware"]["threads"]
    assert RunConfig.read(tmp_path / CONFIG).threads == threads
    assert result["fingerprint"] == config(threads=threads).fingerprint()
    with hardware.threads(3 - threads):  # another shell asks for no number, and gets the run that there is
        assert engine.run(config(), tmp_path) == result
        with pytest.raises(
            UserError, match=rf"another run \(threads: {3 - threads} here, {threads} there\); choose another"
        ):
            engine.run(config(threads=3 - threads), tmp_path)


def test_an_open_run_goes_on_with_the_threads_it_began_with(tmp_path: Path, threads: int) -> None:
    seen: list[int] = []

    def stop(row: dict[str, Any]) -> None:
        seen.append(torch.get_num_threads())
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(config(), tmp_path, on_step=stop)
    with hardware.threads(3 - threads):
        result = engine.run(config(), tmp_path, on_step=stop)
        assert torch.get_num_threads() == 3 - threads
    assert set(seen) == {threads} == {result["config"]["threads"]}


@pytest.mark.parametrize("asked", [None, 2])
def test_runs_from_before_threads_were_recorded_are_read(tmp_path: Path, asked: int | None) -> None:
    first = engine.run(config(threads=2), tmp_path)
    edit(tmp_path / CONFIG, threads=None, device="auto")
    edit(tmp_path / RESULT, fingerprint="of other fields")
    assert engine.run(config(threads=asked), tmp_path)["test_loss"] == first["test_loss"]
    with pytest.raises(UserError, match="threads: 1 here, 2 there"):  # how it ended is known
        engine.run(config(threads=1), tmp_path)
    (
        tmp_path / RESULT
    ).unlink()  # then nothing tells, but its checkpoint: that of a run of before tells nothing, too
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    before = json.loads(state["config"]) | {"threads": None}
    torch.save(state | {"config": json.dumps(before)}, tmp_path / "checkpoint.pt")
    assert engine.run(config(threads=1), tmp_path)["status"] == "done"


def experiment(**fields: Any) -> ExperimentConfig:
    arms = [{"name": "bn", "method": "bn"}, {"name": "nf", "method": "nf"}]
    return ExperimentConfig.create(
        **{"run": RUN, "arms": arms, "seeds": [0], "lrs": [0.1], "batch_sizes": [36], **fields}
    )


def numbers(results: dict[str, Any]) -> list[Any]:
    return [(run["folder"], run["val_loss"], run["test_loss"], run["config"]) for run in results["runs"]]


def test_the_number_of_jobs_changes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOOK", 0.1)
    monkeypatch.setattr(hardware, "core_numbers", lambda: [0, 1])
    monkeypatch.delenv("OMP_NUM_THREADS")
    with hardware.threads(2):
        one, two = (run_experiment(experiment(), tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2))
    assert numbers(one) == numbers(two)
    assert one["experiment"]["run"]["threads"] == 1 == two["hardware"]["threads"]
    # Finished, and with another number of threads in the shell, it is read back.
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(engine, "run", None)
    assert numbers(run_experiment(experiment(), tmp_path / "1", jobs=2)) == numbers(one)
    assert all(run.finished for run in dry_run(experiment(), load(config()), tmp_path / "1"))


@pytest.mark.parametrize(("shell", "asked", "expected"), [("2", None, 2), ("3,2", None, 3), ("2", 4, 4)])
def test_a_sweep_fixes_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str, asked: int | None, expected: int
) -> None:
    def run(config: RunConfig, folder: Path, **_: Any) -> dict[str, Any]:
        given.append(config.threads)
        done = dict.fromkeys(("val_accuracy", "val_loss", "test_accuracy", "test_loss", "ece"), 0.5)
        return done | {"status": "done", "steps": 1}

    given: list[int | None] = []
    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setenv("OMP_NUM_THREADS", shell)
    first = experiment(run=RUN if asked is None else RUN | {"threads": asked})
    run_experiment(first, tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_experiment(experiment(seeds=[0, 1]), tmp_path)
    assert set(given) == {expected}
    assert json.loads((tmp_path / "experiment.json").read_text())["run"]["threads"] == expected
    with pytest.raises(UserError, match=f"threads was {expected}, now 1"):
        run_experiment(experiment(run=RUN | {"threads": 1}), tmp_path)


def test_a_sweep_from_before_goes_on_as_it_ran(tmp_path: Path) -> None:
    edit_to = {"run": {"threads": None, "device": "auto"}}
    (tmp_path / "experiment.json").write_text(json.dumps(edit_to))
    assert settled(experiment(), tmp_path).run["threads"] == hardware.default_threads()
    (tmp_path / "results.json").write_text(json.dumps({"hardware": {"threads": 2, "device": "cpu"}}))
    assert settled(experiment(), tmp_path).run["threads"] == 2
    for damaged in ("", "[]", '{"run": 3}'):
        (tmp_path / "experiment.json").write_text(damaged)
        (tmp_path / "results.json").write_text(damaged)
        assert settled(experiment(), tmp_path).run["threads"] == hardware.default_threads()


@pytest.mark.parametrize(("each", "there", "at_once"), [(1, 2, 2), (2, 4, 2), (2, 3, 1), (8, 2, 1)])
def test_runs_hold_as_many_cores_as_they_have_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int, there: int, at_once: int
) -> None:
    monkeypatch.setattr(hardware, "core_numbers", lambda: list(range(there)))
    tasks = [Task(config(threads=each), tmp_path / "runs" / f"{number}") for number in range(4)]
    held = [cores for task in tasks if (cores := reserved(task)) is not None]
    assert len(held) == at_once
    held.pop().close()
    again = reserved(tasks[3])
    assert again is not None
    for stack in (*held, again):
        stack.close()
    # Processes that may use other cores, as under a scheduler, are not in each other's way.
    first = reserved(tasks[0])
    assert first is not None
    with first:
        monkeypatch.setattr(hardware, "core_numbers", lambda: [100, 101])
        other = reserved(tasks[1])
        assert other is not None
        other.close()


def test_a_run_on_a_gpu_needs_no_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "core_numbers", lambda: [0])
    tasks = [Task(config(device="cuda", threads=4), tmp_path / "runs" / f"{n}") for n in range(3)]
    assert all(reserved(task) is not None for task in tasks)


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("", 1), ("4", 4), ("4,2", 4), ("0", 1), ("many", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert hardware.default_threads() == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert hardware.default_threads() == 1
    assert hardware.cores() <= (os.cpu_count() or 1)
