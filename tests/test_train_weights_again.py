"""What a finished run wrote and somebody deleted is written again, or it is said that it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nfnets.train.config import RunConfig
from nfnets.train.loop import engine
from nfnets.train.loop.trainer import Trainer

CONFIG = RunConfig.create(
    model="train_nets:plain_net",
    train_limit=200,
    epochs=1,
    batch_size=36,
    ema_decay=0.5,
    threads=1,
    device="cpu",
)


@pytest.fixture
def done(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, bytes]]:
    result = engine.run(CONFIG, tmp_path)
    return tmp_path, result, {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("test", [True, False])
@pytest.mark.parametrize(
    "names", [["model.safetensors"], ["ema.safetensors"], ["model.safetensors", "ema.safetensors"]]
)
def test_weights_are_written_again_without_training(
    done: Any, monkeypatch: pytest.MonkeyPatch, names: list[str], test: bool
) -> None:
    folder, result, before = done
    for name in names:
        (folder / name).unlink()
    monkeypatch.setattr(Trainer, "step", None)
    assert engine.run(CONFIG, folder, test=test) == result
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_without_a_checkpoint_it_is_said(done: Any) -> None:
    folder, result, _ = done
    for path in (*folder.glob("checkpoint*"), folder / "model.safetensors"):
        path.unlink()
    said: list[str] = []
    assert engine.run(CONFIG, folder, say=said.append) == result
    assert said == [
        "model.safetensors was deleted, and so were the checkpoints; to train again, choose another folder"
    ]
    assert not (folder / "model.safetensors").exists()
