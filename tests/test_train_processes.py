"""Two gloo processes train one run: the same as one process, and as exact."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import train_kills
from safetensors.torch import load_file

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.loop import log
from nfnets.train.loop.processes import Processes

FIELDS: dict[str, Any] = {
    "model": "train_nets:plain_net",
    "train_limit": 240,
    "epochs": 2,
    "batch_size": 36,
    "mixup": 0.2,
    "clipping": 0.2,
    "eval_batch_size": 50,
    "threads": 1,
    "device": "cpu",
}


def together(fields: dict[str, Any], folder: Path, kill: tuple[str, int] | None = None) -> list[int | None]:
    ranks = train_kills.start_ranks(fields, folder, 2, kill)
    return [train_kills.finish(rank) for rank in ranks]


def test_two_processes_are_one_without_norms(tmp_path: Path):
    assert together(FIELDS, tmp_path / "two") == [0, 0]
    assert train_kills.finish(train_kills.start(FIELDS, tmp_path / "one")) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)
    rows = [log.read(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert [row["loss"] for row in rows[1]] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-4)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert [result["processes"] for result in results] == [1, 2]
    # Every one of the 359 test images counted once: the accuracy is a multiple of 1/359.
    assert results[1]["test_accuracy"] == pytest.approx(results[0]["test_accuracy"], abs=1e-12)
    assert results[1]["test_loss"] == pytest.approx(results[0]["test_loss"], rel=1e-4)


def test_kills_of_two_processes_change_nothing(tmp_path: Path):
    fields = FIELDS | {
        "model": "train_nets:dropout_net",
        "accumulation": 2,
        "ema_decay": 0.9,
        "checkpoint_every": 3,
    }
    assert together(fields, tmp_path / "whole") == [0, 0]
    assert together(fields, tmp_path / "killed", ("step", 5)) == [-signal.SIGKILL] * 2
    assert together(fields, tmp_path / "killed", ("step", 4)) == [-signal.SIGKILL] * 2
    assert together(fields, tmp_path / "killed") == [0, 0]
    assert train_kills.digest(tmp_path / "killed") == train_kills.digest(tmp_path / "whole")
    assert log.read(tmp_path / "killed" / "log.jsonl") == log.read(tmp_path / "whole" / "log.jsonl")


def test_another_number_of_processes_does_not_go_on(tmp_path: Path):
    assert together(FIELDS | {"checkpoint_every": 2}, tmp_path, ("step", 5)) == [-signal.SIGKILL] * 2
    from nfnets.train.loop.engine import run

    for _ in range(2):
        with pytest.raises(
            UserError, match="begun by 2 processes, now 1; go on with torchrun --nproc_per_node 2"
        ):
            run(RunConfig.create(**FIELDS), tmp_path)
        assert together(FIELDS, tmp_path) == [0, 0]  # nor is what two have finished what one would have


def test_batches_must_split_evenly(monkeypatch: pytest.MonkeyPatch):
    alone = Processes(torch.device("cpu"))
    alone.check(RunConfig.create(batch_size=36, accumulation=4))
    alone.size = 8
    with pytest.raises(UserError, match=r"batch_size=36: expected a multiple of .* = 4 × 8"):
        alone.check(RunConfig.create(batch_size=36, accumulation=4))
