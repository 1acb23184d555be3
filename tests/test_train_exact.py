"""The same command gives the same weights, bit for bit, whatever interrupted it (kills: test_train_kills.py)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import train_kills

from nfnets.train.loop import log

FIELDS: dict[str, Any] = {
    "model": "train_nets:dropout_net",
    "data": "digits",
    "train_limit": 240,
    "epochs": 3,
    "batch_size": 36,
    "checkpoint_every": 4,
    "ema_decay": 0.9,
    "warmup_epochs": 1,
    "label_smoothing": 0.1,
    "threads": 1,
    "device": "cpu",
}
STEPS = 3 * (216 // 36)


@pytest.fixture(scope="module", params=[1, 2], ids=["accumulation-1", "accumulation-2"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The uninterrupted run: its fields and its outcome."""
    fields = FIELDS | {"accumulation": request.param}
    folder = tmp_path_factory.mktemp("whole")
    assert train_kills.finish(train_kills.start(fields, folder)) == 0
    return fields, train_kills.outcome(folder)


def test_a_second_run_is_the_same(whole: Any, tmp_path: Path):
    fields, expected = whole
    assert train_kills.finish(train_kills.start(fields, tmp_path)) == 0
    assert train_kills.outcome(tmp_path) == expected
    assert train_kills.steps_logged(tmp_path) == list(range(1, STEPS + 1))
    assert [row["step"] for row in expected["log"] if "split" in row] == [6, 12, 18]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_signals_save_the_state_and_leave(whole: Any, tmp_path: Path, number: signal.Signals, code: int):
    fields, _ = whole
    long = fields | {"checkpoint_every": 10_000, "eval_every": 0}
    process = train_kills.start(long | {"epochs": 100_000}, tmp_path / "long")
    deadline = time.monotonic() + 60
    while not (tmp_path / "long" / "log.jsonl").exists() or not train_kills.steps_logged(tmp_path / "long"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, number)
    assert train_kills.finish(process) == code
    state = torch.load(tmp_path / "long" / "checkpoint.pt", weights_only=True)
    assert state["step"] > 0
    assert train_kills.steps_logged(tmp_path / "long") == list(range(1, state["step"] + 1))


def test_another_evaluation_and_checkpoint_rhythm_gives_the_same_weights(whole: Any, tmp_path: Path):
    fields, expected = whole
    other = fields | {"eval_every": 0, "checkpoint_every": None, "eval_batch_size": 7}
    assert train_kills.finish(train_kills.start(other, tmp_path)) == 0
    assert train_kills.digest(tmp_path) == expected["digest"]


@pytest.mark.parametrize("limit", [100, 8192])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(whole: Any, tmp_path: Path, limit: int):
    fields, expected = whole
    assert train_kills.finish(train_kills.start(fields, tmp_path, ("step", 7))) == -signal.SIGKILL
    assert train_kills.finish(train_kills.start_on_a_full_disk(fields, tmp_path, limit)) == 7
    assert train_kills.finish(train_kills.start(fields, tmp_path)) == 0
    assert train_kills.outcome(tmp_path) == expected


def test_a_truncated_checkpoint_falls_back(whole: Any, tmp_path: Path):
    fields, expected = whole
    process = train_kills.start(fields, tmp_path, ("step", 15))
    assert train_kills.finish(process) == -signal.SIGKILL
    last = tmp_path / "checkpoint.pt"
    os.truncate(last, last.stat().st_size // 3)
    assert train_kills.finish(train_kills.start(fields, tmp_path)) == 0
    assert train_kills.outcome(tmp_path) == expected


def test_a_converted_residual_net_goes_on_exactly(tmp_path: Path):
    """Standardized weights, AGC and the conversion's own constants, with a kill inside the second epoch."""
    fields = {
        "model": "bn_resnet8_cifar",
        "method": "nf",
        "clipping": 0.05,
        "train_limit": 150,
        "epochs": 2,
        "batch_size": 32,
        "checkpoint_every": 3,
        "threads": 1,
        "device": "cpu",
    }
    assert train_kills.finish(train_kills.start(fields, tmp_path / "whole")) == 0
    assert train_kills.finish(train_kills.start(fields, tmp_path / "killed", ("step", 5))) == -signal.SIGKILL
    assert train_kills.finish(train_kills.start(fields, tmp_path / "killed")) == 0
    assert train_kills.digest(tmp_path / "killed") == train_kills.digest(tmp_path / "whole")
    assert log.read(tmp_path / "killed" / "log.jsonl") == log.read(tmp_path / "whole" / "log.jsonl")
