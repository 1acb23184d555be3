"""Every example runs as it stands, and the Lightning callback trains what a plain loop trains."""

from __future__ import annotations

import importlib
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_floors import ROOT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nfnets
from nfnets import callbacks
from nfnets.callbacks import lightning_callback
from nfnets.errors import UserError

EXAMPLES = ROOT / "examples"
# Lightning's and Accelerate's own deprecations are theirs to mend.
theirs = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module
    for file in EXAMPLES.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_every_example_is_run_here_and_listed() -> None:
    source, listed = Path(__file__).read_text(), (ROOT / "docs" / "examples.md").read_text()
    for file in EXAMPLES.glob("*.py"):
        if "def main" in file.read_text():
            assert f'example("{file.stem}")' in source, file.name
            assert f"`examples/{file.name}`" in listed, file.name


def test_plain_pytorch(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = example("plain_pytorch").main(["--smoke", "--out", str(tmp_path)])
    assert 0 <= accuracy <= 1
    assert "pass  batch independence" in capsys.readouterr().out
    for name in ("signal.html", "training.html", "model/config.json", "model/model.safetensors"):
        assert (tmp_path / name).stat().st_size > 100, name


@theirs
def test_with_lightning(example: Any, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: pip install 'nfnets[examples]'")
    metrics = example("with_lightning").main(["--smoke", "--out", str(tmp_path)])
    assert 0 < metrics["signal/var"] < 100
    assert 0 <= metrics["agc/clipped"] <= 1
    assert (tmp_path / "signal.html").stat().st_size > 10_000


@theirs
def test_with_accelerate(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'nfnets[examples]'")
    example("with_accelerate").main(["--smoke"])
    assert "2 steps were clipped" in capsys.readouterr().out, "4 batches, accumulated by 2"


@pytest.mark.parametrize("arm", ["nf", "bn"])
def test_detection(example: Any, arm: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = example("detection").main(["--smoke", "--arm", arm])
    assert math.isfinite(result["loss"])
    assert ("pass  batch independence" in capsys.readouterr().out) is (arm == "nf")


def test_tiled_inference(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worst = example("tiled_inference").main(["--smoke", "--out", str(tmp_path / "tiles.png")])
    assert worst["nf"] < 1e-4 < 1e-3 < worst["group norm"]
    assert "FAIL  tile independence" in capsys.readouterr().out
    assert (tmp_path / "tiles.png").stat().st_size > 10_000


@theirs
@pytest.mark.soak  # its views and gradients: below
def test_private_augmentation(example: Any) -> None:
    pytest.importorskip("opacus")
    found = example("private_augmentation").main(["--smoke"])
    assert 0 < found["epsilon"] < 8
    assert 0 <= found["accuracy"] <= 1


@theirs
def test_gradients_averaged_over_views_are_those_of_the_views_mean_loss(example: Any) -> None:
    pytest.importorskip("opacus")
    from nfnets.privacy import grad_sample_module

    module, generator = example("private_augmentation"), torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    images, labels = torch.randn(3, 1, 6, 6), torch.arange(3)
    shown = module.views(images, 5, generator)
    assert shown.shape == (15, 1, 6, 6)
    expected = []
    for number, label in enumerate(labels):
        own = shown[5 * number : 5 * number + 5]
        loss = F.cross_entropy(model(own), label.repeat(5))
        expected.append(torch.autograd.grad(loss, [*model.parameters()]))
    private = grad_sample_module(model)
    F.cross_entropy(private(shown), labels.repeat_interleave(5)).backward()
    module.average_over_views_(model.parameters(), 5)
    for p, rows in zip(model.parameters(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(p.grad_sample, torch.stack(rows))


def test_views_are_the_image_shifted_by_one_pixel_at_most(example: Any) -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6)
    shown = example("private_augmentation").views(image, 40, torch.Generator().manual_seed(0))
    padded = F.pad(image, (1, 1, 1, 1), value=-1.0)
    possible = [padded[..., r : r + 6, c : c + 6] for r in range(3) for c in range(3)]
    seen = {next(i for i, p in enumerate(possible) if torch.equal(p[0], view)) for view in shown}
    assert seen == set(range(9))


def test_segmentation_at_batch_1(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = example("segmentation").main(["--smoke", "--batch-size", "1"])
    assert math.isfinite(result["loss"])
    printed = capsys.readouterr().out
    assert "Expected more than 1 value per channel" in printed, "what BatchNorm says"
    assert "pass  batch independence" in printed


def test_drawn_boxes_enclose_their_masks(example: Any) -> None:
    scene = example("shapes").scene
    for seed in range(20):
        image, target, mask = scene(48, seed, shapes=1)
        (box,), (label,) = target["boxes"].tolist(), target["labels"].tolist()
        rows, columns = torch.nonzero(mask, as_tuple=True)
        found = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        assert found == box
        assert mask.unique().tolist() == [0, label]
        assert image.min() >= 0
        assert image.max() <= 1


# -- the Lightning callback -------------------------------------------------------------------------------------


def data() -> tuple[TensorDataset, nn.Module]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(32, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (32,), generator=generator)
    torch.manual_seed(0)
    net = nfnets.create_model("bn_resnet8_cifar", num_classes=4)
    return TensorDataset(images, labels), nfnets.convert(net, images)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(nfnets.param_groups(model, lr=0.1, weight_decay=1e-3), lr=0.1, momentum=0.9)


def fit(model: nn.Module, dataset: TensorDataset, callback: Any, epochs: int = 2) -> Any:
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: nfnets[examples]")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            self.model(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.model)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[callback], enable_model_summary=False, **quiet
    )
    loader = DataLoader(dataset, batch_size=8)
    trainer.fit(Module(), loader, loader)
    return trainer


@theirs
def test_the_callback_trains_what_a_plain_loop_trains(tmp_path: Path) -> None:
    dataset, mine = data()
    _, theirs = data()
    callback = lightning_callback(clipping=0.02, every=3, backward=True, folder=tmp_path)
    trainer = fit(theirs, dataset, callback)

    optimizer = sgd(mine)
    handle = nfnets.attach_agc(optimizer, mine, clipping=0.02)
    mine.train()
    for _ in range(2):
        handle.stats.reset()
        for x, y in DataLoader(dataset, batch_size=8):
            loss = F.cross_entropy(mine(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert float(handle.stats.fraction) > 0, "a comparison where nothing was clipped says nothing"
    assert float(trainer.callback_metrics["agc/clipped"]) == pytest.approx(float(handle.stats.fraction))

    report = callback.report()
    assert report.steps == (0, 3, 6), "8 training batches; those of validation are not counted"
    assert any(point.grad_var for point in report.points)
    assert {"signal/var", "signal/mean_sq"} <= trainer.callback_metrics.keys()
    assert (tmp_path / "signal.json").is_file()


@theirs
def test_everything_is_taken_away_when_the_fit_ends() -> None:
    dataset, model = data()
    callback = lightning_callback(clipping=0.02, every=2)
    trainer = fit(model, dataset, callback, epochs=1)
    assert "forward" not in vars(model)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@theirs
def test_a_callback_can_be_pickled_and_says_what_is_wrong() -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: pip install 'nfnets[examples]'")
    again = pickle.loads(pickle.dumps(lightning_callback(clipping=None, every=7)))
    assert type(again) is type(lightning_callback())
    with pytest.raises(UserError, match="nothing was sampled"):
        again.report()
    dataset, model = data()
    with pytest.raises(UserError, match="did you mean model"):
        fit(model, dataset, lightning_callback(network="modle"))


def test_without_lightning_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(callbacks.importlib, "import_module", missing)
    callbacks._class.cache_clear()
    with pytest.raises(UserError, match="pip install lightning"):
        lightning_callback()
    callbacks._class.cache_clear()
