"""The callback for the `Trainer` of transformers, in real trainings of it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nfnets
from nfnets import callbacks
from nfnets.callbacks import huggingface_callback
from nfnets.errors import UserError

# Their own deprecations are theirs to mend.
theirs = pytest.mark.filterwarnings("ignore")


class Classifier(nn.Module):
    """As the trainer wants it: the loss comes with the logits."""

    def __init__(self, batch_size: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        bn = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4)
        )
        self.net = nfnets.convert(bn, torch.randn(32, 3, 8, 8), batch_size=batch_size)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixels)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def fit(model: nn.Module, callback: Any, folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install transformers"
    )
    draw = torch.Generator().manual_seed(1)
    images = [{"pixels": torch.randn(3, 8, 8, generator=draw), "labels": i % 4} for i in range(32)]
    given: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 2,
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    args = transformers.TrainingArguments(**given | options)
    trainer = transformers.Trainer(
        model=model, args=args, train_dataset=images, callbacks=[] if callback is None else [callback]
    )
    trainer.train()
    return trainer


@theirs
def test_it_does_what_the_method_needs_and_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    callback = huggingface_callback(
        every=2, folder=tmp_path, log=lambda values, step: logged.append((values, step))
    )
    trainer = fit(Classifier(), callback, tmp_path)
    (handle,) = callback.clipping
    assert (handle.clipping, handle.head) == (0.14, 20)  # 0.05 · √(64 / 8): 4 images, 2 batches a step
    said = capsys.readouterr().out
    assert "batches of 4 × 2 accumulated" in said
    assert "max_grad_norm" not in said
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert all({"agc/clipped", "signal/mean_sq", "signal/var", "signal/dead"} <= row.keys() for row in rows)
    assert [step for _, step in logged] == [2, 4]
    for (values, _), row in zip(logged, rows, strict=True):
        assert {
            name: row[name] for name in row if name.startswith(("signal/", "agc/"))
        }.items() <= values.items()
        assert any(name.startswith("signal/net.0") for name in values)
    assert callback.report().steps == (0, 2, 4, 6)  # of 8 forward passes
    assert json.loads((tmp_path / "signal.json").read_text())["points"]
    optimizer = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert "forward" not in vars(trainer.model)


@theirs
def test_it_trains_as_attach_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 1, "lr_scheduler_type": "constant", "optim": "sgd"}
    options |= {"train_sampling_strategy": "sequential"}
    model, own = Classifier(4), Classifier(4)
    trainer = fit(model, huggingface_callback(every=1), tmp_path, **options)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.01)
    nfnets.attach(optimizer, own.net, verbose=False)
    images = trainer.train_dataset
    for step in range(4):
        batch = images[4 * step : 4 * step + 4]
        loss = own(torch.stack([i["pixels"] for i in batch]), torch.tensor([i["labels"] for i in batch]))[
            "loss"
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (name, mine), theirs in zip(own.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(theirs, mine, msg=name)


@theirs
def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Classifier(), huggingface_callback(network="net", every=None), tmp_path, max_grad_norm=1.0)
    assert "max_grad_norm=1 clips the whole gradient first; pass max_grad_norm=0" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean net"):
        fit(Classifier(), huggingface_callback(network="nets"), tmp_path)
    with pytest.raises(UserError, match="log=3: expected a callable"):
        huggingface_callback(log=3)  # type: ignore[arg-type]
    again = pickle.loads(pickle.dumps(huggingface_callback(every=7)))
    assert type(again) is type(huggingface_callback())


def test_without_transformers_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(callbacks.importlib, "import_module", missing)
    callbacks._trainer_class.cache_clear()
    with pytest.raises(UserError, match=r"transformers is not installed.*pip install transformers"):
        huggingface_callback()
    callbacks._trainer_class.cache_clear()
