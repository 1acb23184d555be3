from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.loop import checkpoint, engine, folder, log


def test_round_trip_and_the_previous_one(tmp_path: Path):
    assert checkpoint.load(tmp_path) is None
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, {"step": step, "x": torch.full((3,), float(step))})
    state = checkpoint.load(tmp_path)
    assert state is not None
    assert state["step"] == 3
    assert state["x"].tolist() == [3.0] * 3
    assert torch.load(tmp_path / checkpoint.PREVIOUS, weights_only=True)["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.PREVIOUS, checkpoint.NAME]


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.99))
def test_any_truncation_falls_back_and_says_so(tmp_path_factory: pytest.TempPathFactory, share: float):
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        checkpoint.save(folder, {"step": step, "x": torch.arange(100)})
    last = folder / checkpoint.NAME
    os.truncate(last, int(last.stat().st_size * share))
    said: list[str] = []
    state = checkpoint.load(folder, said.append)
    assert state is not None
    assert state["step"] == 1
    assert len(said) == 1
    assert "checkpoint.pt: unreadable" in said[0]
    assert "went back" in said[0]
    assert "\n" not in said[0]


def test_two_damaged_checkpoints_are_an_error(tmp_path: Path):
    for step in (1, 2):
        checkpoint.save(tmp_path, {"step": step})
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="delete the folder"):
        checkpoint.load(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    torch.save({"step": 1, "x": Evil()}, tmp_path / checkpoint.NAME)
    with pytest.raises(UserError, match="unreadable"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "made").exists()


def test_log_is_cut_back_to_the_checkpoint(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    with log.Log(path) as first:
        first.write([{"step": 1}, {"step": 2, "loss": float("nan")}])
        kept = first.sync()
        first.write([{"step": 3}])
    with path.open("ab") as file:
        file.write(b'{"st')
    assert [row["step"] for row in log.read(path)] == [1, 2, 3]
    with log.Log(path, kept) as second:
        second.write([{"step": 3, "again": True}])
    assert log.read(path) == [{"step": 1}, {"step": 2, "loss": None}, {"step": 3, "again": True}]


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="3 bytes, its checkpoint wrote 10"):
        log.Log(tmp_path / "log.jsonl", 10)
    assert (tmp_path / "log.jsonl").read_text() == "{}\n"


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["step"]


def test_the_last_k_and_the_best_are_kept(tmp_path: Path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, {"step": step}, keep=4, best=step in (2, 5))
    kept = {path.name: step_of(path) for path in tmp_path.iterdir()}
    assert kept == {
        "checkpoint.pt": 6,
        "checkpoint.previous.pt": 5,
        "checkpoint.previous-2.pt": 4,
        "checkpoint.previous-3.pt": 3,
        "checkpoint.best.pt": 5,
    }
    for name in checkpoint.names(3):  # three damaged ones in a row
        (tmp_path / name).write_bytes(b"")
    said: list[str] = []
    state = checkpoint.load(tmp_path, said.append)
    assert state is not None
    assert state["step"] == 3
    assert len(said) == 1
    checkpoint.save(tmp_path, {"step": 7}, keep=2)  # fewer are wanted from now on
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        checkpoint.BEST,
        checkpoint.PREVIOUS,
        checkpoint.NAME,
    ]
    checkpoint.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*names: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    checkpoint.save(tmp_path, {"step": 1}, best=True)
    checkpoint.save(tmp_path, {"step": 2})
    assert (step_of(tmp_path / checkpoint.BEST), step_of(tmp_path / checkpoint.NAME)) == (1, 2)


@pytest.mark.parametrize("number", range(5))
def test_a_kill_between_any_two_renames_leaves_the_newest(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
):
    for step in range(1, 4):
        checkpoint.save(tmp_path, {"step": step}, keep=3)
    replace, left = os.replace, [number]

    def replaced(source: object, target: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt  # nothing after it runs, as after a kill
        replace(source, target)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replaced)
        if number < 3:
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, {"step": 4}, keep=3)
        else:
            checkpoint.save(tmp_path, {"step": 4}, keep=3)
    state = checkpoint.load(tmp_path)
    assert state is not None
    assert state["step"] == (4 if number >= 3 else 3)
    checkpoint.save(tmp_path, {"step": 5}, keep=3)
    assert step_of(tmp_path / checkpoint.NAME) == 5


def test_the_engine_keeps_the_best_by_validation(tmp_path: Path):
    fields = {
        "model": "train_nets:plain_net",
        "train_limit": 200,
        "epochs": 5,
        "batch_size": 60,
        "threads": 1,
    }
    result = engine.run(RunConfig.create(**fields, keep_checkpoints=3, lr=0.3, device="cpu"), tmp_path)
    rows = [row for row in log.read(tmp_path / "log.jsonl") if row.get("split") == "val"]
    best = max(rows, key=lambda row: (row["accuracy"], -row["loss"]))
    assert result["best"] == {name: best[name] for name in ("step", "loss", "accuracy")}
    assert step_of(tmp_path / checkpoint.BEST) == best["step"]
    assert [step_of(tmp_path / name) for name in checkpoint.names(3)] == [15, 12, 9]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot be written"):
            checkpoint.save(tmp_path, {"step": 1})
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")  # root, too, makes no folder in a file
    config = RunConfig.create(model="train_nets:plain_net", train_limit=80, device="cpu")
    with pytest.raises(UserError, match="cannot be written") as caught:
        engine.run(config, tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_does_not_keep_the_folder_locked(tmp_path: Path):
    with folder.owned(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        assert folder.in_use(tmp_path)
    try:
        deadline = time.monotonic() + 30
        while folder.in_use(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)  # until the child has run at all
        assert child.is_alive()
        assert not folder.in_use(tmp_path)
    finally:
        child.kill()
        child.join()
