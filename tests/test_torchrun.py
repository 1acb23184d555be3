"""The documented commands under `torchrun`: two ranks train one run as one process would, or share a sweep."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nfnets.train.config import RunConfig
from nfnets.train.loop import engine, log

SETTINGS = [
    "--model",
    "bn_resnet8_cifar",
    "--train-limit",
    "150",
    "--set",
    "threads=1",
    "--set",
    "device=cpu",
]


def torchrun(door: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "-m", door, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_ranks_are_one_process_with_the_doubled_batch(tmp_path: Path) -> None:
    # The global batch is 24: two ranks of 12 against one process of 24. The nf arm has no batch statistics.
    # (With seeds 0 and 1 an activation lies within rounding of ReLU's kink: up to 1e-3 in fp32, 2e-16 in fp64.)
    out = torchrun(
        "nfnets.train", *SETTINGS, "--method", "nf", "--epochs", "2", "--batch-size", "24", "--lr", "0.05",
        "--clipping", "0.1", "--seed", "2", "--out", str(tmp_path / "two"),
    )  # fmt: skip
    assert out.count("test accuracy") == 1, "one rank speaks for both"
    config = RunConfig.read(tmp_path / "two" / "config.json")
    assert (config.method, config.clipping, config.batch_size) == ("nf", 0.1, 24)
    one = engine.run(config, tmp_path / "one")
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["steps"] == one["steps"] == 10
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-5)
    losses = [
        [row["loss"] for row in log.read(tmp_path / name / "log.jsonl") if "split" not in row]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert one["test_loss"] == pytest.approx(two["test_loss"], rel=1e-4)


@pytest.mark.soak  # what the other does then: tests/test_train_kills.py
@pytest.mark.slow
def test_who_is_left_alone_says_so_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "nfnets.train", *SETTINGS, "--epochs", "1000", "--batch-size", "24"]
    command += ["--set", "eval_every=0", "--out", str(tmp_path / "run")]
    left, lost = (
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    )
    try:
        until = time.monotonic() + 120
        steps = tmp_path / "run" / "log.jsonl"
        while not (steps.exists() and log.read(steps)) and time.monotonic() < until:
            time.sleep(0.2)
        lost.kill()
        _, said = left.communicate(timeout=120)
    finally:
        for process in (left, lost):
            process.kill()
            process.communicate()
    assert left.returncode == 2
    assert said.splitlines()[-1].startswith("error: one of the 2 processes of this run has ended")
    assert "Traceback" not in said


@pytest.mark.soak  # ranks that train: above; processes that share a sweep: tests/test_sweep_shared.py
@pytest.mark.slow
def test_two_ranks_share_a_sweep(tmp_path: Path) -> None:
    out = torchrun(
        "nfnets", "compare", *SETTINGS, "--epochs", "1", "--batch-size", "24", "--lrs", "0.1", "--seeds", "1",
        "--out", str(tmp_path / "sweep"),
    )  # fmt: skip
    assert out.count("the whole comparison") == 1
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert results["complete"]
    assert len(results["runs"]) == 2
    for run in results["runs"]:
        result = json.loads((tmp_path / "sweep" / run["folder"] / "result.json").read_text())
        assert result["processes"] == 1
        rows = log.read(tmp_path / "sweep" / run["folder"] / "log.jsonl")
        assert [row["step"] for row in rows if "split" not in row] == list(range(1, 6))
    assert (tmp_path / "sweep" / "index.html").is_file()
