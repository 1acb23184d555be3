"""The Lightning callback where one network, one optimizer and one process are not all there is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import nfnets
from nfnets.callbacks import _NormalizerFree, lightning_callback
from nfnets.errors import UserError
from nfnets.signal import SignalReport
from tests.ranks import WORLD, needs_gloo, on_ranks


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))


def images() -> Tensor:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x[8:] += 2.0  # halves whose means differ: averaging their variances would be wrong
    return x


# -- several processes ----------------------------------------------------------------------------------------------


class Module(nn.Module):
    """A LightningModule as DDP sees it: what DDP wraps is not the network."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()
        self.logged: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean()

    def log_dict(self, values: dict[str, Any]) -> None:
        self.logged |= values


def fit_by_hand(callback: _NormalizerFree, x: Tensor, first: bool, ddp: bool) -> Module:
    """The calls that Lightning makes."""
    module = Module()
    stepped: nn.Module = nn.parallel.DistributedDataParallel(module) if ddp else module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    trainer = SimpleNamespace(optimizers=[optimizer], is_global_zero=first)
    callback.on_train_start(trainer, module)
    for step in range(3):
        callback.on_train_batch_start(trainer, module, None, step)
        optimizer.zero_grad()
        stepped(x).backward()
        optimizer.step()
        callback.on_train_batch_end(trainer, module, None, None, step)
    callback.on_train_epoch_end(trainer, module)
    callback.on_train_end(trainer, module)
    return module


def hooks(folder: str | Path) -> _NormalizerFree:
    return _NormalizerFree(0.02, "model", 1e-3, "head", 10, 2, True, folder)


def work(rank: int, folder: str) -> None:
    part = images().tensor_split(WORLD)[rank]
    callback = hooks(f"{folder}/{rank}")
    module = fit_by_hand(callback, part, rank == 0, ddp=True)
    assert (Path(folder) / str(rank) / "signal.json").exists() == (rank == 0), "one rank writes"
    assert callback.report().meta["ranks"] == WORLD
    assert "ranks" not in callback.report(merge=False).meta
    logged = {name: float(value) for name, value in module.logged.items()}
    Path(f"{folder}/logged-{rank}.json").write_text(json.dumps(logged))


@needs_gloo
def test_a_report_of_several_ranks_is_about_the_whole_batch(tmp_path: Path) -> None:
    on_ranks(work, tmp_path)
    alone = hooks(tmp_path / "alone")
    logged = fit_by_hand(alone, images(), first=True, ddp=False).logged
    merged = SignalReport.from_json(tmp_path / "0" / "signal.json")
    assert merged.meta["ranks"] == WORLD
    for point, other in zip(merged.points, alone.report().points, strict=True):
        assert (point.name, point.count) == (other.name, other.count)
        assert (point.mean_sq, point.var) == pytest.approx((other.mean_sq, other.var), rel=1e-3, abs=1e-6)
    for rank in range(WORLD):
        found = json.loads((tmp_path / f"logged-{rank}.json").read_text())
        assert found == pytest.approx({name: float(value) for name, value in logged.items()}, rel=1e-3)


# -- several optimizers, another network ----------------------------------------------------------------------------


def fit(callback: Any, optimizers: int = 2) -> Any:
    """Two networks and an optimizer for each, as a GAN has them, or for the first alone."""
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: nfnets[examples]")

    class Both(pl.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.model, self.critic = net(), net()

        def training_step(self, batch: list[Tensor], _: int) -> None:
            for optimizer, each in zip(self.trainer.optimizers, (self.model, self.critic), strict=False):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(each(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            both = (self.model, self.critic)[:optimizers]
            return [torch.optim.SGD(each.parameters(), lr=0.1) for each in both]

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[callback], enable_model_summary=False, **quiet
    )
    loader = DataLoader(TensorDataset(images(), torch.arange(16) % 4), batch_size=8)
    trainer.fit(Both(), loader)
    return trainer


# Lightning's own deprecations are its own to mend.
theirs = pytest.mark.filterwarnings("ignore")


@theirs
def test_only_optimizers_of_the_network_are_clipped(tmp_path: Path) -> None:
    callback = lightning_callback(clipping=0.02, head=10, every=1, folder=tmp_path)
    trainer = fit(callback)
    assert len(trainer.optimizers) == 2
    (handle,) = callback.clipping
    assert handle._optimizer is trainer.optimizers[0]
    assert handle.head == 10
    assert "agc/clipped" in trainer.callback_metrics
    assert len(callback.report().steps) == 4
    both = lightning_callback(clipping=0.02, network="", every=None)
    fit(both)
    assert len(both.clipping) == 2


@theirs
def test_a_network_that_nobody_trains_is_refused() -> None:
    with pytest.raises(UserError, match="network='critic': none of its parameters"):
        fit(lightning_callback(network="critic", every=None), optimizers=1)


@theirs
def test_a_network_that_nobody_calls_is_named_and_costs_no_training(tmp_path: Path) -> None:
    callback = lightning_callback(clipping=0.02, network="", every=1, folder=tmp_path)
    with pytest.warns(UserWarning, match="network='' ran in no training batch.*network='model' or"):
        fit(callback)
    assert not list(tmp_path.iterdir())


def converted(batch_size: int | None) -> nn.Module:
    bn = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    return nfnets.convert(bn, torch.randn(32, 3, 8, 8), batch_size=batch_size)


@pytest.mark.parametrize(
    ("kept", "given", "loader", "λ"),
    [(4, None, 16, 0.071), (None, None, 16, 0.035), (4, 64, 16, 0.018), (None, 2, None, 0.1)],
)
def test_the_default_is_the_recipe(
    kept: int | None, given: int | None, loader: int | None, λ: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """λ = 0.05 · √(64 / images), of one step: a batch, times 2 accumulated, times 4 devices."""
    callback = _NormalizerFree("auto", "model", 1e-3, "head", "auto", None, False, None, given)
    module = Module()
    module.model = converted(kept)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    trainer = SimpleNamespace(
        optimizers=[optimizer], is_global_zero=True, accumulate_grad_batches=2, world_size=4
    )
    trainer.train_dataloader = SimpleNamespace(batch_size=loader)
    callback.on_train_start(trainer, module)
    (handle,) = callback.clipping
    assert (handle.clipping, handle.head) == (λ, 20)
    assert "2 accumulated × 4 processes" in capsys.readouterr().out
    callback.on_train_end(trainer, module)
    assert not optimizer._optimizer_step_pre_hooks


def test_the_default_asks_for_what_it_does_not_know() -> None:
    callback = _NormalizerFree("auto", "model", 1e-3, "head", "auto", None, False, None)
    module = Module()
    trainer = SimpleNamespace(optimizers=[torch.optim.SGD(module.parameters(), lr=0.01)], is_global_zero=True)
    with pytest.raises(UserError, match=r"was not converted by nfnets\.convert"):
        callback.on_train_start(trainer, module)
    module.model = converted(None)
    trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.01)]
    with pytest.raises(UserError, match="batch_size is not known"):
        callback.on_train_start(trainer, module)
