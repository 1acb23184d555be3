"""The whole of `nfnets compare`: what is measured beside the training, and what lies in the folder at the end."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from nfnets.errors import UserError
from nfnets.signal import SignalReport
from nfnets.train.compare import ExperimentConfig, cost
from nfnets.train.compare.sweep import sweep
from nfnets.train.config import RunConfig

RUN = {"model": "bn_resnet8_cifar", "data": "digits", "epochs": 1, "train_limit": 120, "threads": 1}
CONFIG = ExperimentConfig.create(
    run=RUN,
    arms=[{"name": "bn", "method": "bn"}, {"name": "nf", "method": "nf", "ema_decay": 0.5}],
    seeds=[0, 1],
    lrs=[0.1],
    batch_sizes=[32],
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, sweep(CONFIG, out, Console(quiet=True), jobs=1, command="nfnets compare").results


def test_everything_the_page_links_is_there(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    text = (out / "index.html").read_text()
    links = set(re.findall(r'<a href="([^"#]+)"', text.split("<main>")[1]))
    assert {f"{run['folder']}/config.json" for run in results["runs"]} <= links
    assert {"signal.html", "signal-after.html", "runs/nf-b32-lr0.1-s0/signal.html"} <= links
    assert all((out / link).is_file() for link in links)
    for heading in (
        "Time to accuracy",
        "Speed and memory",
        "Calibration",
        "Signal propagation after training",
    ):
        assert f">{heading}</h2>" in text


def test_the_signal_after_training_is_the_trained_models(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    for arm, weights in (
        ("bn", "model"),
        ("nf", "ema"),
    ):  # where there is an average, it is what is evaluated
        folder = out / "runs" / f"{arm}-b32-lr0.1-s0"
        report = SignalReport.from_json(folder / "signal.json")
        assert report.steps == (0, results["runs"][0]["steps"])
        trained = load_file(folder / f"{weights}.safetensors")
        measured = {p.name: p.weight_norm for p in report.points if p.step and p.weight_norm is not None}
        assert len(measured) > 8
        for name, norm in measured.items():
            assert norm == pytest.approx(float(trained[f"{name}.weight"].norm()), rel=1e-5)
        start = {p.name: p.weight_norm for p in report.points if not p.step}
        assert any(start[name] != pytest.approx(norm, rel=1e-3) for name, norm in measured.items())
    after = SignalReport.from_json(out / "signal-after.json")
    assert after.models == ("bn", "nf")


def test_what_is_there_is_read_back(done: tuple[Path, dict[str, Any]]) -> None:
    out, results = done
    kept = [*out.glob("cost/*.json"), *out.glob("runs/*/signal.html"), *out.glob("runs/*/model.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(before) == 2 + 2 + 4
    assert sweep(CONFIG, out, Console(quiet=True), jobs=1, command="nfnets compare").results == results
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert json.loads((out / "results.json").read_text()) == results


def test_costs_are_of_the_steps_alone(done: tuple[Path, dict[str, Any]]) -> None:
    _, results = done
    assert [(entry["arm"], entry["batch_size"]) for entry in results["costs"]] == [("bn", 32), ("nf", 32)]
    for entry in results["costs"]:
        assert cost.LEAST <= len(entry["step_seconds"]) <= cost.MOST
        median = statistics.median(entry["step_seconds"])
        assert entry["images_per_second"] == pytest.approx(32 / median)
        assert entry["peak_memory_mb"] > 0


def test_memory_grows_with_the_batch_by_what_the_activations_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MOST", 3)
    run = RunConfig.create(**{**RUN, "model": "bn_resnet20_cifar", "train_limit": None})
    small, large = (
        cost._in_a_process(run.model_copy(update={"batch_size": size}))["peak_memory_mb"]
        for size in (8, 1024)
    )
    # Saved for backward of a CIFAR-ResNet at 8 × 8: per image and stage n, 12 maps or more of 16·64/2^n floats.
    least = 1016 * 12 * (1024 + 512 + 256) * 4 / 2**20
    assert least < large - small < 12 * least


def test_an_arm_that_cannot_train_is_one_line(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"run": RUN | {"model": "bn_resnet9_cifar"}})
    with pytest.raises(UserError, match="unknown model"):
        cost.measure_all(config, tmp_path)
