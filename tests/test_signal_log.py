"""A probe's values go where people look: any callable that takes a dictionary and a step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nfnets
from nfnets.errors import UserError


class Residual(nn.Module):
    """Two blocks; the first runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x + layer(x.relu())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in (self.one, self.one, self.two):
            x = self.block(layer, x)
        return self.head(x.mean((2, 3)))


def train(model: nn.Module, steps: int, **options: Any) -> nfnets.signal.Probe:
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with nfnets.probe(model, backward=True, updates=True, **options) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return probe


def test_each_sampled_step_is_logged_once_and_as_the_report_has_it() -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    probe = train(Residual(), 6, every=2, log=lambda values, step: logged.append((step, values)))
    assert [step for step, _ in logged] == [0, 2, 4]
    report = probe.report()
    for step, values in logged:
        joins = report.select(step=step, role="join")
        assert len(joins) == 3
        assert values["signal/var"] == max(p.var for p in joins if p.var is not None)
        for p in (*joins, *report.select(step=step, role="stem"), *report.select(step=step, role="head")):
            name = p.name.replace("#", "-")
            for each in ("mean_sq", "var", "residual_var", "grad_var", "update_ratio"):
                assert values.get(f"signal/{name}/{each}") == getattr(p, each), (step, name, each)
        assert all(re.fullmatch(r"[/\w.\- ]*", name) for name in values), "MLflow takes no other letters"
        assert all(type(value) is float for value in values.values())
    assert any(name.endswith("/update_ratio") for name in logged[-1][1])


def test_what_is_open_for_one_batch_at_a_time_logs_when_it_closes() -> None:
    logged: list[int] = []
    model = Residual()
    probe = nfnets.probe(model, every=2, log=lambda values, step: logged.append(step))
    for step in range(5):
        with probe:
            model(torch.randn(4, 3, 8, 8))
        assert logged == list(range(0, step + 1, 2))
    assert probe.report().steps == (0, 2, 4)


def test_nothing_changes_and_nothing_is_logged_where_training_fails() -> None:
    logged: list[int] = []
    plain, probed = Residual(), Residual()
    train(plain, 3, every=3)
    train(probed, 3, every=1, log=lambda values, step: logged.append(step))
    assert all(map(torch.equal, plain.parameters(), probed.parameters()))

    def fails() -> None:
        with nfnets.probe(probed, log=lambda values, step: logged.append(-1)):
            probed(torch.randn(4, 3, 8, 8))
            raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        fails()
    assert logged == [0, 1, 2]


def test_tensorboard_holds_it(tmp_path: Path) -> None:
    boards = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = boards.SummaryWriter(str(tmp_path))
    kept: dict[tuple[str, int], float] = {}

    def log(values: dict[str, float], step: int) -> None:
        kept.update({(name, step): value for name, value in values.items()})
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    train(Residual(), 4, every=2, log=log)
    writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    tags = found.Tags()["scalars"]
    read = {(tag, event.step): event.value for tag in tags for event in found.Scalars(tag)}
    assert read == pytest.approx(kept)
    assert {step for _, step in read} == {0, 2}


def test_what_cannot_be_called_is_refused() -> None:
    class Writer:
        def add_scalar(self, *given: Any) -> None: ...

    with pytest.raises(
        UserError, match=r"log=Writer: expected a callable .*; pass lambda values, step: \[writer\.add_scalar"
    ):
        nfnets.probe(Residual(), log=Writer())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"log='wandb': expected a callable .* mlflow\.log_metrics"):
        nfnets.probe(Residual(), log="wandb")  # type: ignore[arg-type]
