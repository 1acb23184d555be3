"""Arms that name a published recipe: how they train follows it, what they share and search does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nfnets.errors import UserError
from nfnets.train.compare import Arm, ExperimentConfig, Trial
from nfnets.train.named_recipes import RECIPES

RUN = {"model": "bn_resnet8_cifar", "data": "digits", "epochs": 9}


def experiment(*arms: dict[str, Any], **fields: Any) -> ExperimentConfig:
    return ExperimentConfig.create(run=RUN, arms=list(arms), lrs=[0.1, 0.2], batch_sizes=[32], **fields)


def test_an_arm_trains_by_its_recipe_and_keeps_what_all_share():
    plain, published = (
        experiment({"name": "a", "method": "nf"} | more).run_config(Trial("a", 32, 0.2, 1))
        for more in ({}, {"recipe": "nf-resnet"})
    )
    values = {name: value.value for name, value in RECIPES["nf-resnet"].values.items()}
    for name in ("weight_decay", "label_smoothing", "nesterov", "momentum", "schedule"):
        assert getattr(published, name) == values[name]
    assert plain.label_smoothing != published.label_smoothing
    # The warm-up keeps its share of the run's length: 5 of 90 epochs in the source.
    assert published.warmup_epochs == pytest.approx(values["warmup_epochs"] * 9 / values["epochs"])
    shared = ("model", "method", "data", "epochs", "image_size", "lr", "batch_size", "seed")
    assert [getattr(published, name) for name in shared] == [getattr(plain, name) for name in shared]


def test_what_the_arm_sets_itself_wins_over_its_recipe():
    config = experiment({"name": "a", "method": "nf", "recipe": "nf-resnet", "label_smoothing": 0.3})
    assert config.run_config(Trial("a", 32, 0.1, 0)).label_smoothing == 0.3


def test_a_word_can_name_a_recipe():
    arm = Arm.parse("nf:recipe=nf-resnet:alpha=0.5")
    assert (arm.recipe, arm.fields) == ("nf-resnet", {"method": "nf", "method_options": {"alpha": 0.5}})


def test_an_unknown_recipe_is_one_line_before_anything_runs():
    with pytest.raises(UserError, match="unknown recipe 'nf-resnt': did you mean nf-resnet") as caught:
        experiment({"name": "a", "method": "nf", "recipe": "nf-resnt"})
    assert "\n" not in str(caught.value)


def test_experiments_are_written_as_they_are_read():
    config = experiment({"name": "a", "method": "bn"}, {"name": "b", "method": "nf", "recipe": "nf-resnet"})
    written = json.loads(json.dumps(config.model_dump(mode="json")))
    assert "recipe" not in written["arms"][0]  # as in experiments that were begun before arms had recipes
    assert written["arms"][1]["recipe"] == "nf-resnet"
    assert ExperimentConfig.create(**written) == config
