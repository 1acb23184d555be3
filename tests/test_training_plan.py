"""The numbers of docs/training.md's plan: counted again on our own models, and worked out again."""

from __future__ import annotations

import re

import pytest
import torch
from test_floors import ROOT
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import nfnets
from nfnets.train.compare import ExperimentConfig

TEXT = (ROOT / "docs" / "training.md").read_text()
SIZES = {"nfnet_f0": 192, "nfnet_f1": 224}
HELD_OUT = 0.01


def row(beginning: str) -> list[float]:
    """The numbers of a table's row, one per model."""
    (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| {beginning}")]
    return [float(re.findall(r"[\d,.]+", cell)[0].replace(",", "")) for cell in line.split("|")[2:4]]


def kept_values(model: torch.nn.Module, size: int) -> int:
    """Values that autograd keeps per image, each tensor once: what a second image adds."""

    def kept(batch: int) -> int:
        there: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                there[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()(torch.empty(batch, 3, size, size, device="meta"))
        return sum(tensor.numel() for tensor in there.values())

    return kept(2) - kept(1)


@pytest.fixture(scope="module")
def counted() -> list[tuple[float, float, float]]:
    """Parameters, forward FLOPs of one image, and values kept, of both models."""
    found = []
    for name, size in SIZES.items():
        with torch.device("meta"):
            model = nfnets.create_model(name)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.empty(1, 3, size, size, device="meta"))
        found.append(
            (
                sum(p.numel() for p in model.parameters()),
                counter.get_total_flops(),
                kept_values(model, size),
            )
        )
    return found


def test_what_is_counted(counted: list[tuple[float, float, float]]) -> None:
    parameters, flops, kept = zip(*counted, strict=True)
    assert row("parameters") == pytest.approx([n / 1e6 for n in parameters], abs=0.05)
    assert row("forward at training") == pytest.approx([f / 1e9 for f in flops], abs=0.05)
    assert row("training step, GFLOP") == pytest.approx([3 * f / 1e9 for f in flops], abs=0.05)
    assert row("values kept") == pytest.approx([v / 1e6 for v in kept], abs=0.05)


def test_what_follows(counted: list[tuple[float, float, float]]) -> None:
    images = round(1_281_167 * (1 - HELD_OUT))
    steps = 360 * (images // 4096)
    assert f"{images:,}" in TEXT
    assert f"{images // 4096} steps" in TEXT
    assert f"{steps:,} steps or {steps * 4096 / 1e6:.1f} million" in TEXT
    for (parameters, flops, kept), milliseconds, column in zip(counted, (56.7, 133.9), (0, 1), strict=True):
        step = 3 * flops
        published = 32 / milliseconds * 1000
        assert f"{published:.0f}" in TEXT
        assert f"{published * step / 1e12:.1f}" in TEXT
        assert f"{published * step / 125e12:.0%}".replace("%", " %") in TEXT
        one = 0.2 * 312e12 / step
        eight = 8 * 0.95 * one
        hours = steps * 4096 / eight / 3600
        assert row("images/s of one GPU")[column] == pytest.approx(one, rel=0.002)
        assert row("images/s of eight")[column] == pytest.approx(eight, rel=0.002)
        assert row("hours for 360")[column] == pytest.approx(hours, abs=0.06)
        assert row("GPU hours")[column] == pytest.approx(8 * hours, abs=0.6)
        assert row("kept values at 512")[column] == pytest.approx(2 * 512 * kept / 1e9, abs=0.06)
        assert row("weights, gradients")[column] == pytest.approx(5 * 4 * parameters / 1e9, abs=0.06)
        assert f"{4 * parameters / 1e9:.2f} GB" in TEXT
        assert f"{eight / 100:.0f}" in TEXT


def test_the_experiment_file_is_one(tmp_path: object) -> None:
    import yaml

    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.S)
    config = ExperimentConfig.create(**yaml.safe_load(block))
    assert len(config.planned()) == 4 * 3 * (3 + 4)
    assert config.target == 0.9


def test_the_commands_options_exist() -> None:
    import typer

    from nfnets.cli import app
    from nfnets.train.config import RunConfig

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    joined = TEXT.replace("\\\n", " ")
    used = re.findall(r"nfnets (train|compare)((?: [^\n`]*)?)", joined)
    assert len(used) > 6
    for name, rest in used:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--[a-z][a-z-]+", rest.split("#")[0])) <= known, rest
    assert set(re.findall(r"--set ([a-z_]+)=", TEXT)) <= set(RunConfig.model_fields)
