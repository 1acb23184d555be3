from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_model

from nfnets.errors import UserError
from nfnets.train import run
from nfnets.train.augment.pipeline import augmenter
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.loop.arm import arm_model, first_images
from nfnets.train.loop.order import Batches
from nfnets.train.models import build, check_output

SHAPE = {"num_classes": 7, "channels": 1, "size": 32}


@pytest.mark.parametrize(
    "spec",
    [
        "timm:resnet10t",
        "torchvision:resnet18",
        "torchvision:mobilenet_v3_small",
        "train_nets:dropout_net",
        "bn_resnet8_cifar",
    ],
)
def test_every_form_builds_for_the_data(spec: str):
    model = build(spec, **SHAPE)
    assert model.training
    check_output(model, torch.zeros(2, 1, 32, 32), 7, spec)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_the_builds_are_the_libraries_own():
    torch.manual_seed(0)
    ours = build("timm:resnet18", num_classes=7, channels=3, size=32)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=7)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    torch.manual_seed(0)
    ours = build("torchvision:resnet18", num_classes=7, channels=3, size=32)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_builders_get_what_they_accept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build("train_nets:without_arguments", **SHAPE)
    (tmp_path / "my_own_net.py").write_text(
        "import torch\n"
        "def make(num_classes, size, width=3):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(size * size, width),\n"
        "                               torch.nn.Linear(width, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)  # found where the command is called from, without an installation
    model = build("my_own_net:make", **SHAPE, options={"width": 5})
    assert model[1].out_features == 5
    assert model[2].out_features == 7


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("timm:resnet18x", "unknown timm model 'resnet18x': did you mean"),
        ("torchvision:resnet19", "unknown torchvision model 'resnet19': did you mean"),
        ("bn_resnet21_cifar", "unknown model 'bn_resnet21_cifar': did you mean"),
        ("no_such_module:build", "cannot import no_such_module"),
        ("train_nets:dropout_nett", "did you mean dropout_net"),
        ("train_nets:not_a_module", "returned int, expected a torch.nn.Module"),
    ],
)
def test_unknown_models_in_one_line(spec: str, says: str):
    with pytest.raises(UserError) as caught:
        build(spec, **SHAPE)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_options_name_the_model():
    for spec in ("timm:resnet18", "torchvision:resnet18", "bn_resnet8_cifar", "train_nets:dropout_net"):
        with pytest.raises(UserError, match=spec.split(":")[-1]):
            build(spec, **SHAPE, options={"nonsense": 1})


def test_outputs_are_checked():
    with pytest.raises(UserError, match=r"gives \(2, 8\) for 2 images, expected \(2, 7\)"):
        check_output(
            build("train_nets:wrong_classes", num_classes=7, channels=1, size=8),
            torch.zeros(2, 1, 8, 8),
            7,
            "m",
        )
    with pytest.raises(UserError, match=r"cannot train on batches of shape \(2, 1, 9, 9\)"):
        check_output(
            build("train_nets:wrong_classes", num_classes=7, channels=1, size=8),
            torch.zeros(2, 1, 9, 9),
            7,
            "m",
        )


def test_checking_moves_no_statistic():
    model = build("train_nets:dropout_net", **SHAPE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_output(model, torch.randn(2, 1, 8, 8), 7, "m")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_arms_of_a_seed_start_from_the_same_weights():
    config = RunConfig.create(model="bn_resnet8_cifar")
    data = load(config)
    generator = torch.get_rng_state()
    bn, again = arm_model(config, data), arm_model(config, data)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(a, b) for a, b in zip(bn.parameters(), again.parameters(), strict=True))
    other = arm_model(RunConfig.create(model="bn_resnet8_cifar", seed=1), data)
    assert not torch.equal(other.conv1.weight, bn.conv1.weight)
    nf = arm_model(RunConfig.create(model="bn_resnet8_cifar", method="nf"), data)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in nf.modules())
    assert nf.conv1.weight.shape == bn.conv1.weight.shape
    assert nf(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_bn_takes_no_options():
    with pytest.raises(UserError, match="leaves the model alone"):
        arm_model(
            RunConfig.create(model="bn_resnet8_cifar", method_options={"alpha": 1}), load(RunConfig.create())
        )


def test_init_from_is_the_state_before_conversion(tmp_path: Path) -> None:
    donor = build("bn_resnet8_cifar", num_classes=10, channels=1, size=8)
    path = tmp_path / "donor.safetensors"
    save_model(donor, str(path))
    config = RunConfig.create(model="bn_resnet8_cifar", method="fold", init_from=path, seed=3)
    data = load(config)
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(arm_model(config, data).eval()(images), donor.eval()(images))
    moved = tmp_path / "moved.safetensors"
    path.rename(moved)
    elsewhere = config.model_copy(update={"init_from": moved})
    assert (
        elsewhere.fingerprint()
        == RunConfig.create(**config.model_dump() | {"init_from": moved}).fingerprint()
    )
    with pytest.raises(UserError, match=r"init_from=.*: weights of another model: missing "):
        arm_model(RunConfig.create(model="bn_resnet14_cifar", init_from=moved), data)
    with pytest.raises(UserError, match="cannot be read"):
        config.fingerprint()
    moved.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match=r"init_from=.*not readable as weights"):
        arm_model(elsewhere, data)


def test_a_small_batch_is_converted_on_the_images_of_several() -> None:
    config = RunConfig.create(model="bn_resnet8_cifar", method="nf", batch_size=4)
    data = load(config)
    images = first_images(config, data, at_least=62)
    assert len(images) == 64  # whole batches, one after the other
    torch.testing.assert_close(images[:4], first_images(config, data), rtol=0, atol=0)
    assert len({image.numpy().tobytes() for image in images}) == 64
    by_itself, told = arm_model(config, data).state_dict(), arm_model(config, data, images).state_dict()
    one_batch = arm_model(config, data, images[:4]).state_dict()
    assert all(torch.equal(by_itself[name], value) for name, value in told.items())
    assert not all(torch.equal(by_itself[name], value) for name, value in one_batch.items())
    few = config.model_copy(update={"train_limit": 20})
    assert len(first_images(few, load(few), at_least=64)) == len(load(few).train) // 4 * 4  # one epoch


@pytest.mark.parametrize(
    ("batch_size", "options", "expected"),
    [(4, {}, False), (32, {}, True), (4, {"channelwise": True}, True), (32, {"channelwise": False}, False)],
)
def test_channels_are_set_where_the_batch_is_large(
    batch_size: int, options: dict[str, bool], expected: bool
) -> None:
    config = RunConfig.create(
        model="bn_resnet8_cifar", method="nf", batch_size=batch_size, method_options=options
    )
    gains = [p for name, p in arm_model(config, load(config)).named_parameters() if name.endswith("gain")]
    assert gains
    assert any(bool((gain != 1).any()) for gain in gains) == expected


@pytest.mark.parametrize("method", ["bn", "nf"])
def test_only_gains_and_biases_learn(method: str, tmp_path: Path) -> None:
    """BatchNorm-only training, and the same without BatchNorm: every weight ends as it began."""
    config = RunConfig.create(
        model="bn_resnet8_cifar",
        method=method,
        train="affine",
        train_limit=200,
        epochs=1,
        batch_size=32,
        lr=0.05,
    )
    data = load(config)
    before = {name: p.detach().clone() for name, p in arm_model(config, data).named_parameters()}
    run(config, tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    moved = {name for name, p in before.items() if not torch.equal(p, after[name])}
    kinds = {name.rpartition(".")[2] for name in before if before[name].ndim == 1}
    assert {name for name in before if before[name].ndim > 1}.isdisjoint(moved)
    assert moved == {name for name, p in before.items() if p.ndim <= 1}
    assert kinds == ({"weight", "bias"} if method == "bn" else {"gain", "bias"})


@pytest.mark.parametrize("order", ["shuffled", "fixed"])
def test_a_fixed_order_is_the_first_epochs_in_every_epoch(order: str) -> None:
    config = RunConfig.create(order=order, train_limit=200, batch_size=32, epochs=3)
    data = load(config)
    batches = Batches(data, config, augmenter(data, config))
    epochs = [
        [batch.index for batch in batches.from_step(e * batches.per_epoch, (e + 1) * batches.per_epoch)]
        for e in range(3)
    ]
    same = [all(torch.equal(a, b) for a, b in zip(epochs[0], other, strict=True)) for other in epochs[1:]]
    assert same == [order == "fixed"] * 2
    first = next(batches.from_step(batches.per_epoch, batches.per_epoch + 1))
    again = next(batches.from_step(0, 1))
    assert not torch.equal(first.images, again.images)  # augmented anew
    middle = [batch.index for batch in batches.from_step(batches.per_epoch + 2, batches.per_epoch + 4)]
    assert all(torch.equal(a, b) for a, b in zip(middle, epochs[1][2:4], strict=True))  # a resumed run
