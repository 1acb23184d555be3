from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import log_loss
from torch.nn import functional as F

from nfnets.errors import UserError
from nfnets.train.augment.pipeline import augmenter
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.loop import checkpoint, engine, evaluate, log
from nfnets.train.loop.engine import run
from nfnets.train.loop.order import Batches
from nfnets.train.loop.schedule import learning_rate
from nfnets.train.models import build

FIELDS: dict[str, Any] = {
    "model": "train_nets:plain_net",
    "train_limit": 200,
    "epochs": 2,
    "batch_size": 30,
    "threads": 1,
    "device": "cpu",
}


def config(**fields: Any) -> RunConfig:
    return RunConfig.create(**(FIELDS | fields))


def test_a_run_leaves_everything(tmp_path: Path):
    rows: list[dict[str, Any]] = []
    result = run(config(), tmp_path / "run", on_step=rows.append)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "done"
    assert result["diverged_at"] is None
    assert result["steps"] == 12
    assert result["samples"] == {"train": 180, "val": 20, "test": 359}
    assert 0 <= result["test_accuracy"] <= 1
    assert result["test_loss"] > 0
    assert 0 <= result["ece"] <= 1
    assert result["train_seconds"] > 0
    assert result["images_per_second"] > 0
    assert result["peak_memory_mb"] > 0
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert RunConfig.read(tmp_path / "run" / "config.json") == config()
    logged = log.read(tmp_path / "run" / "log.jsonl")
    assert [{**row, "steps": 12} for row in logged] == rows
    steps = [row for row in logged if "split" not in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["epoch"] for row in steps] == pytest.approx([i / 6 for i in range(1, 13)], abs=1e-6)
    assert [row["lr"] for row in steps] == [learning_rate(t, peak=0.1, total=12) for t in range(12)]
    evaluations = [row for row in logged if "split" in row]
    assert [(row["step"], row["epoch"], row["split"]) for row in evaluations] == [
        (6, 1, "val"),
        (12, 2, "val"),
    ]
    assert evaluations[-1]["accuracy"] == result["val_accuracy"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_weights_are_those_of_a_plain_loop(tmp_path: Path, name: str):
    """Against a loop in torch's own words: warm-up and cosine, smoothing, decay on matrices only."""
    settings = config(weight_decay=0.01, warmup_epochs=1, label_smoothing=0.1, optimizer=name, lr=0.05)
    run(settings, tmp_path)
    data = load(settings)
    from nfnets.train.keyed import seeded

    with seeded(0, "init"):
        model = build(settings.model, num_classes=10, channels=1, size=8)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.999)),
    }[name]()
    for step, batch in enumerate(Batches(data, settings, augmenter(data, settings)).from_step(0, 12)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=0.05, total=12, warmup=6)
        optimizer.zero_grad()
        F.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1).backward()
        optimizer.step()
    ours = load_file(tmp_path / "model.safetensors")
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)


def test_accumulation_is_the_whole_batch_without_norms(tmp_path: Path):
    one, three = (run(config(accumulation=a, precision="fp32"), tmp_path / str(a)) for a in (1, 3))
    assert one["status"] == three["status"] == "done"
    a, b = (load_file(tmp_path / str(n) / "model.safetensors") for n in (1, 3))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_on_the_cpu(tmp_path: Path, precision: str):
    result = run(config(precision=precision, epochs=4, train_limit=600), tmp_path)
    assert result["status"] == "done"
    assert result["val_loss"] < math.log(10)


def test_channels_last_changes_the_layout_only(tmp_path: Path):
    run(config(), tmp_path / "a")
    run(config(channels_last=True), tmp_path / "b")
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_ema_is_the_average_that_is_evaluated(tmp_path: Path):
    settings = config(ema_decay=0.5)
    result = run(settings, tmp_path)
    data = load(settings)
    model = build(settings.model, num_classes=10, channels=1, size=8)
    model.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    again = evaluate.evaluate(model, data.test, augmenter(data, settings).normalize, batch_size=100)
    assert again.loss == pytest.approx(result["test_loss"], rel=1e-6)
    raw = load_file(tmp_path / "model.safetensors")
    assert any(not torch.equal(raw[name], tensor) for name, tensor in model.state_dict().items())


def test_a_finished_run_is_returned_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = run(config(), tmp_path)
    monkeypatch.setattr(engine, "load", None)  # reading the data again would fail
    assert run(config(threads=None, eval_every=2), tmp_path) == first


def test_without_resume_it_starts_again(tmp_path: Path):
    first = run(config(), tmp_path)
    rows: list[dict[str, Any]] = []
    second = run(config(), tmp_path, resume=False, on_step=rows.append)
    assert [row["step"] for row in rows if "split" not in row] == list(range(1, 13))
    assert second["test_loss"] == first["test_loss"]


def test_another_runs_folder_is_refused_and_kept(tmp_path: Path):
    run(config(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for resume in (True, False):
        with pytest.raises(
            UserError, match=r"holds another run \(lr: 0\.2 here, 0\.1 there; seed: 1 here, 0 there\)"
        ):
            run(config(lr=0.2, seed=1), tmp_path, resume=resume)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_runs_checkpoint_is_refused(tmp_path: Path):
    run(config(), tmp_path)
    for name in ("config.json", "result.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"its checkpoint is another run's \(lr: 0\.2 here"):
        run(config(lr=0.2), tmp_path)


def test_divergence_is_recorded_and_stops_the_run(tmp_path: Path):
    result = run(config(lr=1e12, epochs=400), tmp_path)
    assert result["status"] == "diverged"
    assert result["steps"] == result["diverged_at"] < 100
    assert result["test_accuracy"] is None
    assert result["val_accuracy"] is None
    rows = [row for row in log.read(tmp_path / "log.jsonl") if "split" not in row]
    assert rows[-1] == {**rows[-1], "step": result["diverged_at"], "loss": None}
    assert all(row["loss"] is not None for row in rows[:-1])
    assert run(config(lr=1e12, epochs=400), tmp_path) == result


def test_a_callbacks_interrupt_saves_the_state(tmp_path: Path):
    expected = run(config(), tmp_path / "whole")

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config(checkpoint_every=100), tmp_path / "run", on_step=stop)
    assert checkpoint.load(tmp_path / "run")["step"] == 6  # pyright: ignore[reportOptionalSubscript]
    result = run(config(checkpoint_every=100), tmp_path / "run")
    assert result["test_loss"] == expected["test_loss"]
    assert log.read(tmp_path / "run" / "log.jsonl") == log.read(tmp_path / "whole" / "log.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        run(config(), tmp_path / "run")


def test_a_file_in_the_folders_place(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \(File exists\)"):
        run(config(), tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        run(config(), tmp_path / "file" / "run")


def test_a_folder_in_use_names_the_process(tmp_path: Path):
    from nfnets.train.loop import folder

    with (
        folder.owned(tmp_path),
        pytest.raises(UserError, match=f"in use by process {os.getpid()}"),
    ):
        run(config(), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="torch sees no GPU"):
        run(config(device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_models_leave_no_folder_behind_a_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="unknown timm model"):
        run(config(model="timm:resnet18x"), tmp_path / "run")
    # The corrected command may use the same folder.
    assert run(config(), tmp_path / "run")["status"] == "done"


def test_a_batch_of_one_value_per_channel_is_refused(tmp_path: Path):
    settings = config(model="train_nets:pooled_norm", batch_size=4, accumulation=4)
    with pytest.raises(
        UserError, match=r"cannot train on batches of shape \(1, 1, 8, 8\): Expected more than 1 value"
    ):
        run(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("batch_size", [1, 7, 359, 1000])
def test_evaluation_counts_every_sample_once(batch_size: int):
    settings = config()
    data = load(settings)
    torch.manual_seed(0)
    model = build("train_nets:dropout_net", num_classes=10, channels=1, size=8)
    normalize = augmenter(data, settings).normalize
    got = evaluate.evaluate(model, data.test, normalize, batch_size=batch_size)
    assert model.training
    model.eval()
    with torch.no_grad():
        probabilities = model(normalize(data.test.images)).double().softmax(1)
    labels = data.test.labels
    assert got.count == 359
    assert got.accuracy == int((probabilities.argmax(1) == labels).sum()) / 359
    assert got.loss == pytest.approx(log_loss(labels, probabilities.numpy(), labels=range(10)), rel=1e-6)


def test_calibration_error_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(1000, generator=generator).double()
    correct = torch.rand(1000, generator=generator) < confidence**2
    got = evaluate.metrics(torch.zeros(1000), correct, confidence)
    expected = 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        if inside.any():
            gap = correct[inside].double().mean() - confidence[inside].mean()
            expected += float(inside.double().mean() * gap.abs())
    assert got.ece == pytest.approx(expected, rel=1e-9)
    assert sum(n for n, _, _ in got.bins) == 1000
    assert evaluate.metrics(torch.zeros(4), torch.ones(4) > 0, torch.ones(4)).ece == 0.0
