"""Every training feature at once is as exact as a plain run: after a kill, with other evaluations, in two processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import train_kills
from safetensors.torch import load_file

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.loop import log
from nfnets.train.loop.arm import arm_model
from nfnets.train.loop.engine import run
from nfnets.train.loop.evaluate import evaluate
from nfnets.train.loop.processes import Processes
from nfnets.train.loop.session import prepare

SMALL: dict[str, Any] = {
    "model": "train_nets:residual_net",
    "data": "digits",
    "train_limit": 160,
    "epochs": 2,
    "batch_size": 36,
    "checkpoint_every": 3,
    "threads": 1,
    "device": "cpu",
}
EVERYTHING: dict[str, Any] = SMALL | {
    "drop_rate": 0.1,
    "drop_path_rate": 0.2,
    "randaugment_layers": 2,
    "random_erasing": 0.5,
    "erasing_fill": "noise",
    "augment_repeats": 3,
    "mixup": 0.2,
    "cutmix": 1.0,
    "optimizer": "lookahead_lamb",
    "optimizer_options": {"betas": [0.8, 0.99]},
    "lr": 0.01,
    "clipping": 0.1,
    "sam_rho": 0.05,
    "sam_share": 0.5,
    "schedule": "steps",
    "decay_epochs": [1.5],
    "warmup_epochs": 0.5,
    "accumulation": 2,
    "ema_decay": 0.9,
    "grad_checkpointing": True,
}


def alone(fields: dict[str, Any], folder: Path, kill: tuple[str, int] | None = None) -> int | None:
    return train_kills.finish(train_kills.start(fields, folder, kill))


def together(fields: dict[str, Any], folder: Path, kill: tuple[str, int] | None = None) -> list[int | None]:
    return [train_kills.finish(rank) for rank in train_kills.start_ranks(fields, folder, 2, kill)]


def test_kills_and_other_evaluations_change_nothing(tmp_path: Path):
    fields = EVERYTHING | {"precision": "fp16"}  # the scaler's state, too
    assert alone(fields, tmp_path / "whole") == 0
    assert alone(fields, tmp_path / "killed", ("step", 5)) == -signal.SIGKILL
    assert alone(fields, tmp_path / "killed", ("half-saved", 1)) == -signal.SIGKILL
    assert alone(fields | {"eval_every": 0, "eval_batch_size": 7}, tmp_path / "killed") == 0
    assert train_kills.digest(tmp_path / "killed") == train_kills.digest(tmp_path / "whole")
    rows = [
        [row for row in log.read(tmp_path / name / "log.jsonl") if "split" not in row]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(1, 9))
    assert len({row["lr"] for row in rows[0]}) > 2


def test_kills_of_two_processes_change_nothing(tmp_path: Path):
    fields = EVERYTHING | {"sync_bn": True, "accumulation": 1}
    assert together(fields, tmp_path / "whole") == [0, 0]
    assert together(fields, tmp_path / "killed", ("step", 5)) == [-signal.SIGKILL] * 2
    assert together(fields, tmp_path / "killed") == [0, 0]
    assert train_kills.digest(tmp_path / "killed") == train_kills.digest(tmp_path / "whole")


def same_weights(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=tolerance, atol=tolerance)


def test_two_processes_are_one_with_whole_batch_features(tmp_path: Path):
    """Norm-free, with all that looks at a whole batch or its gradient."""
    fields = EVERYTHING | {
        "model": "train_nets:plain_net",
        "optimizer": "sgd",
        "optimizer_options": {},
        "sam_share": 1.0,
        "accumulation": 1,
        "grad_checkpointing": False,
        "drop_rate": None,
        "drop_path_rate": None,
    }
    assert together(fields, tmp_path / "two") == [0, 0]
    assert alone(fields, tmp_path / "one") == 0
    same_weights(tmp_path / "one", tmp_path / "two")


def test_synchronized_batchnorm_is_the_whole_batchs(tmp_path: Path):
    fields = SMALL | {"epochs": 1, "lr": 0.05}
    assert alone(fields, tmp_path / "one") == 0
    assert together(fields | {"sync_bn": True}, tmp_path / "synchronized") == [0, 0]
    assert together(fields, tmp_path / "apart") == [0, 0]
    same_weights(tmp_path / "one", tmp_path / "synchronized", 2e-5)
    with pytest.raises(AssertionError):
        same_weights(tmp_path / "one", tmp_path / "apart", 1e-3)


def test_drop_rates_reach_the_model():
    def model(**fields: Any) -> Any:
        config = RunConfig.create(**({"data": "digits"} | fields))
        return arm_model(config, load(config))

    own = model(model="train_nets:residual_net", drop_rate=0.3, drop_path_rate=0.2)
    assert own[4].p == 0.3
    assert own[1][0].drop_path_rate == 0.2
    deep = model(model="timm:resnet10t", drop_rate=0.3, drop_path_rate=0.2)
    assert deep.drop_rate == 0.3
    assert deep.layer4[0].drop_path.drop_prob == pytest.approx(0.2)
    theirs = model(model="torchvision:efficientnet_b0", drop_rate=0.3, drop_path_rate=0.2)
    assert theirs.classifier[0].p == 0.3
    assert theirs.features[7][0].stochastic_depth.p > 0.18
    assert model(model="nf_resnet8_cifar", drop_rate=0.3).head.drop.p == 0.3
    assert model(model="bn_resnet8_cifar", drop_rate=0.3).drop_rate == 0.3
    for name, says in {
        "train_nets:plain_net": "drop_rate=0.3: train_nets:plain_net has no argument drop_rate",
        "timm:vgg11": "drop_path_rate",
        "torchvision:vgg11": "stochastic_depth_prob",
    }.items():
        with pytest.raises(UserError, match=says):
            model(model=name, drop_rate=0.3, drop_path_rate=0.2)


def test_recomputing_changes_no_number(tmp_path: Path):
    fields = SMALL | {"drop_rate": 0.1, "drop_path_rate": 0.2, "ema_decay": 0.9}
    for lean in (False, True):
        run(RunConfig.create(**fields, grad_checkpointing=lean), tmp_path / str(lean))
    digests = [train_kills.digest(tmp_path / name) for name in ("False", "True")]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_compiled_run_is_the_same_model_and_exact(tmp_path: Path):
    fields = SMALL | {"model": "train_nets:dropout_net", "clipping": 0.1, "eval_batch_size": 400}
    run(RunConfig.create(**fields), tmp_path / "eager")
    compiled = fields | {"compile": True}
    minutes = 600.0  # compiling takes seconds, on a busy machine minutes
    assert train_kills.finish(train_kills.start(compiled, tmp_path / "whole"), minutes) == 0
    killed = train_kills.start(compiled, tmp_path / "killed", ("step", 5))
    assert train_kills.finish(killed, minutes) == -signal.SIGKILL
    assert train_kills.finish(train_kills.start(compiled, tmp_path / "killed"), minutes) == 0
    assert train_kills.digest(tmp_path / "killed") == train_kills.digest(tmp_path / "whole")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "eager")]
    # Draws inside compiled code are others: the same training, not the same numbers.
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=0.3)
    assert results[0]["compile_seconds"] > results[1]["compile_seconds"] == 0


def test_warming_up_changes_nothing():
    config = RunConfig.create(**EVERYTHING)
    data = load(config)
    augment, batches, trainer = prepare(config, data, Processes(torch.device("cpu")))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.warm_up(batches.first())
    assert trainer.step_count == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert evaluate(trainer.evaluated, data.val, augment.normalize, batch_size=9).count == len(data.val)
