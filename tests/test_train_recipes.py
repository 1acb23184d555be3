from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_floors import ROOT
from typer.testing import CliRunner

from nfnets.advice import clipping
from nfnets.cli import app
from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.models import build
from nfnets.train.named_recipes import RECIPES, recipe, run_config

FLAGS: dict[str, tuple[Any, bool]] = {
    "model": ("bn_resnet20_cifar", False),
    "method": ("nf", False),
    "data": ("digits", False),
    "epochs": (10, False),
    "batch_size": (64, False),
    "lr": (0.1, False),
}


def flags(**given: Any) -> dict[str, tuple[Any, bool]]:
    return FLAGS | {name: (value, True) for name, value in given.items()}


# By hand from the sources, independent of how the module writes them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "nf-resnet": {"batch_size": 1024, "lr": 0.4, "epochs": 90, "warmup_epochs": 5, "weight_decay": 1e-4},
    "nfnet": {
        "batch_size": 4096,
        "lr": 1.6,
        "epochs": 360,
        "warmup_epochs": 5,
        "weight_decay": 2e-5,
        "clipping": 0.01,
        "clipping_eps": 1e-3,
        "label_smoothing": 0.1,
        "drop_path_rate": 0.25,
        "drop_rate": 0.2,
        "ema_decay": 0.99999,
        "nesterov": True,
        "precision": "bf16",
        "randaugment_layers": 4,
        "randaugment_magnitude": 5,
        "mixup": 0.2,
        "image_size": 192,
    },
    "fixup-cifar": {
        "batch_size": 128,
        "lr": 0.1,
        "epochs": 200,
        "decay_epochs": (100, 150),
        "weight_decay": 1e-4,
        "mixup": 1.0,
        "nesterov": False,
    },
    "fixup-imagenet": {
        "batch_size": 256,
        "lr": 0.1,
        "epochs": 90,
        "decay_epochs": (30, 60),
        "weight_decay": 1e-4,
        "mixup": 0.7,
    },
    "bn-cifar": {"batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "momentum": 0.9, "nesterov": False},
    "bn-imagenet": {"batch_size": 1024, "lr": 0.4, "epochs": 90, "label_smoothing": 0.1, "method": "bn"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name: str):
    config = run_config(name, flags(data_dir="."))
    for field, value in PUBLISHED[name].items():
        assert getattr(config, field) == pytest.approx(value), field


def test_every_value_has_a_source_and_every_model_exists():
    assert set(RECIPES) == set(PUBLISHED)
    for found in RECIPES.values():
        for field, value in found.values.items():
            assert value.source or value.note, (found.name, field)
        options = found.fields()
        drops = {name: options[name] for name in ("drop_rate", "drop_path_rate") if name in options}
        with torch.device("meta"):
            model = build(
                options["model"],
                num_classes=10,
                channels=3,
                size=32,
                options=options.get("model_options", {}) | drops,
            )
        assert sum(p.numel() for p in model.parameters()) > 1e6


def test_what_is_given_wins_and_the_rest_follows_it():
    config = run_config("nfnet", flags(batch_size=256, epochs=36, data="digits", model="bn_resnet8_cifar"))
    assert (config.batch_size, config.lr, config.warmup_epochs) == (256, 0.1, 0.5)
    assert (config.data, config.model, config.clipping) == ("digits", "bn_resnet8_cifar", 0.01)
    assert run_config("nfnet", flags(data_dir="."), {"clipping": None}).clipping is None
    assert run_config("nfnet", flags(data_dir="."), {"lr": 0.3}).lr == 0.3
    assert run_config("nfnet", flags(data_dir="."), {"batch_size": 512}).lr == 0.2
    steps = run_config("fixup-cifar", flags(epochs=20))
    assert steps.decay_epochs == (10.0, 15.0)
    assert run_config("bn-cifar", flags(model="timm:resnet18")).model_options == {}


def test_without_a_recipe_the_method_decides():
    assert run_config(None, flags(batch_size=256)).clipping == clipping("nf", 256) == 0.025
    assert run_config(None, flags(method="bn")).clipping is None
    assert run_config(None, flags(), {"method": "bn"}).clipping is None
    assert run_config(None, flags(clipping=None)).clipping is None
    given = {k: v for k, (v, _) in FLAGS.items()}
    assert run_config(None, FLAGS) == RunConfig.create(**given, clipping=0.05, clipping_head=20)


def test_the_guide_shows_the_clipping_that_the_rule_gives():
    text = (ROOT / "docs" / "recipes.md").read_text()
    table = re.search(r"\| images per step (.*)\n.*\n\| λ [^|]*(.*)\n", text)
    assert table is not None
    batches, shown = ([float(cell) for cell in row.strip("| ").split("|")] for row in table.groups())
    assert len(batches) >= 8
    assert [clipping("nf", int(batch)) for batch in batches] == shown
    guide = (ROOT / "docs" / "guides" / "tiny-batch.md").read_text()  # at batch 4
    assert f"| λ of clipping | `attach` | {clipping('nf', 4)} |" in guide
    assert clipping("skipinit", 4) is None


def test_a_folded_net_is_fine_tuned_gently_clipped_and_centralized():
    config = run_config(None, flags(method="fold", batch_size=16))
    assert (config.clipping, config.centralization) == (0.07, True)
    assert (config.optimizer, config.lr) == ("adamw", 0.002)
    assert run_config(None, flags(method="fold"), {"batch_size": 4}).lr == 0.001
    sgd = run_config(None, flags(method="fold"), {"batch_size": 4, "optimizer": "sgd"})
    assert (sgd.optimizer, sgd.lr) == ("sgd", 0.005)
    default = RunConfig.model_fields["lr"].default
    assert run_config(None, flags(method="fold"), {"optimizer": "lamb"}).lr == default  # nobody measured it
    assert not run_config(None, flags(method="nf")).centralization
    assert run_config(None, flags(method="fold", lr=0.3, clipping=0.1)).lr == 0.3
    assert run_config("bn-cifar", flags(method="fold")).lr == 0.1  # a recipe that is named says more
    assert run_config(None, flags(method="nf")).lr == RunConfig.model_fields["lr"].default


def test_the_commands(tmp_path: Path):
    def command(*words: str) -> str:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        return result.output

    shown = command("recipes")
    assert all(name in shown for name in RECIPES)
    assert "0.01" in command("recipes", "nfnet")
    tiny = [
        "--data",
        "digits",
        "--model",
        "train_nets:plain_net",
        "--train-limit",
        "200",
        "--set",
        "threads=1",
    ]
    tiny += ["--recipe", "bn-cifar", "--batch-size", "32", "--epochs", "2", "--out", str(tmp_path / "run")]
    assert "suggested learning rate" in command("train", *tiny, "--lr-range")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert "test accuracy" in command("train", *tiny)
    config = RunConfig.read(tmp_path / "run" / "config.json")
    assert (config.method, config.lr, config.epochs, config.batch_size) == ("bn", 0.025, 2, 32)
    assert config.decay_epochs == pytest.approx((1.0, 274 / 182))
    assert (config.nesterov, config.weight_decay, config.schedule) == (False, 1e-4, "steps")


def test_faults_in_one_line():
    with pytest.raises(UserError, match="unknown recipe 'nfnets': did you mean nfnet"):
        recipe("nfnets")
    with pytest.raises(UserError, match="batch_size=0"):
        run_config("bn-cifar", flags(batch_size=0))
    with pytest.raises(UserError, match="epochs='x'"):
        run_config("bn-cifar", flags(), {"epochs": "x"})
