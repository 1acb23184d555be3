from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfnets.errors import UserError
from nfnets.train import checkpoint, log


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


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    checkpoint.write_text(path, "old")

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.write_atomic(path, full)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


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
