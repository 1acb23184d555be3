"""TensorBoard's own reader finds in the event files what the JSONL log holds."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nfnets.errors import UserError
from nfnets.signal import Point, SignalReport
from nfnets.train.compare.board import Board, write_signal
from nfnets.train.compare.progress import train_with_progress
from nfnets.train.config import RunConfig
from nfnets.train.loop import log

CONFIG = RunConfig.create(model="bn_resnet8_cifar", train_limit=120, epochs=2, batch_size=32, threads=1)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        reader: Any = EventAccumulator(str(folder), purge_orphaned_data=True)
        reader.Reload()
        return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def quiet_import() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.utils.tensorboard  # noqa: F401


def test_the_event_files_hold_the_log(tmp_path: Path) -> None:
    quiet_import()
    result = train_with_progress(CONFIG, tmp_path, Console(quiet=True), tensorboard=True)
    found = scalars(tmp_path / "tensorboard")
    rows = log.read(tmp_path / "log.jsonl")
    steps = [row for row in rows if "split" not in row]
    validations = [row for row in rows if "split" in row]
    assert found["train/loss"] == [(row["step"], pytest.approx(row["loss"])) for row in steps]
    assert found["train/lr"] == [(row["step"], pytest.approx(row["lr"])) for row in steps]
    assert found["val/accuracy"] == [(row["step"], pytest.approx(row["accuracy"])) for row in validations]
    assert found["test/accuracy"] == [(result["steps"], pytest.approx(result["test_accuracy"]))]
    # A finished run is read back and adds nothing.
    train_with_progress(CONFIG, tmp_path, Console(quiet=True), tensorboard=True)
    assert scalars(tmp_path / "tensorboard") == found


def test_a_run_that_went_on_at_its_checkpoint_shows_every_step_once(tmp_path: Path) -> None:
    quiet_import()
    first = Board(tmp_path)
    for step in (1, 2, 3, 4):
        first({"step": step, "loss": float(step), "lr": 0.1})
    first.close()
    again = Board(tmp_path)
    for step in (3, 4, 5):
        again({"step": step, "loss": 10.0 * step, "lr": 0.1})
    again.finish({"steps": 5, "test_loss": None, "test_accuracy": None, "ece": None})
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert "test/loss" not in found


def test_signal_reports_are_scalars_by_step(tmp_path: Path) -> None:
    quiet_import()
    write_signal(SignalReport([Point("nf", "conv1", "conv", step=s, var=1.0 + s) for s in (0, 7)]), tmp_path)
    (values,) = scalars(tmp_path / "tensorboard" / "signal").values()
    assert values == [(0, 1.0), (7, 8.0)]


def test_without_tensorboard_nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard") as error:
        train_with_progress(CONFIG, tmp_path / "run", Console(quiet=True), tensorboard=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
