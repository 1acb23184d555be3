"""Weights from timm and back, checkpoints of other variants, and our names in timm's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models.nfnet import NormFreeNet as TimmNormFreeNet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.models import (
    create_model,
    list_models,
    load_timm,
    load_weights,
    register,
    register_with_timm,
    registry,
    timm_registry,
    to_timm_state_dict,
)

# Each stem, attention, activation, padding, place of γ and rounding that timm has.
PARITY = (
    "test_nfnet",
    "nf_resnet50",
    "nf_regnet_b1",
    "eca_nfnet_l0",
    "dm_nfnet_f0",
    "nf_seresnet26",
    "nf_ecaresnet26",
)


def scrambled(name: str, **options: Any) -> nn.Module:
    """timm's model with random gains, biases and scalars too, so that every parameter matters."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim <= 1 or parameter_name.endswith("gain"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", PARITY)
def test_outputs_are_timms_both_ways(name: str) -> None:
    few = {} if name == "test_nfnet" else {"depths": (1, 2, 1, 1)}
    theirs = scrambled(name, num_classes=7, **few)
    images = torch.randn(2, 3, 65, 96)  # odd: TensorFlow's padding differs from the symmetric one
    ours = load_timm(theirs)
    assert not ours.training
    again = timm.create_model(name, num_classes=7, **few).eval()
    again.load_state_dict(to_timm_state_dict(ours))
    with torch.inference_mode():
        expected = theirs(images)
        assert expected.std() > 1e-3
        assert relative_difference(ours(images), expected) < 1e-5
        assert relative_difference(again(images), expected) < 1e-5
    before = theirs.state_dict()
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, before[key], msg=key)


@pytest.mark.parametrize("name", ["eca_nfnet_l0", "nfnet_l0"])
def test_ours_of_that_name_is_timms_network(name: str) -> None:
    """`create_model` and `load_timm` agree, and timm's weights fit the former."""
    short = {"depths": (1, 2, 1, 1)}
    theirs = scrambled(name, **short)
    ours = create_model(name, **short).eval()
    load_weights(ours, load_timm(theirs).state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert relative_difference(ours(images), theirs(images)) < 1e-5


def test_deepminds_weights_fit_f0() -> None:
    short = {"depths": (1, 2, 1, 1)}
    loaded = load_timm(timm.create_model("dm_nfnet_f0", **short)).state_dict()
    ours = create_model("nfnet_f0", **short, activation="gelu", constants="deepmind")
    load_weights(ours, loaded)
    assert all(torch.equal(value, loaded[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"in_chans": 1}, {"num_classes": 0}, {"alpha": 0.5}, {"act_layer": "relu"}]
)
def test_timm_options_are_followed(options: dict[str, Any]) -> None:
    theirs = scrambled("test_nfnet", **options)
    images = torch.randn(2, options.get("in_chans", 3), 64, 64)
    with torch.inference_mode():
        assert relative_difference(load_timm(theirs)(images), theirs(images)) < 1e-5


def test_load_timm_by_name_keeps_options() -> None:
    model = load_timm("test_nfnet", num_classes=5, drop_rate=0.25)
    assert model.num_classes == 5
    assert model.head.drop.p == 0.25


def test_double_precision_is_kept() -> None:
    theirs = scrambled("test_nfnet").double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-9)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    ours = load_timm(theirs)
    weight = theirs.state_dict()["stem.conv1.weight"]
    assert torch.equal(ours.state_dict()["stem.conv1.weight"], weight)
    with torch.inference_mode():
        assert relative_difference(ours(images), theirs(images)) < 1e-6  # constants are fp32 numbers


def test_filters_below_and_above_the_floor_are_imported_exactly() -> None:
    """N·v under our floor of 1e-4, at it, constant filters, huge ones: the gain takes up the difference."""
    theirs = scrambled("test_nfnet").double()
    conv = theirs.get_submodule("stages.2.0.conv2")
    with torch.no_grad():
        factors = torch.logspace(-8, 4, conv.weight.shape[0], dtype=torch.float64)  # type: ignore[union-attr, index]
        conv.weight.mul_(factors.reshape(-1, 1, 1, 1))  # type: ignore[union-attr, operator]
        conv.weight[0] = 1.0  # type: ignore[index, operator]
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        assert relative_difference(load_timm(theirs)(images), theirs(images)) < 1e-6


def test_load_timm_refuses_what_it_cannot_read() -> None:
    with pytest.raises(UserError, match=r"timm model 'nf_resnet51': did you mean .*nf_resnet50"):
        load_timm("nf_resnet51")
    with pytest.raises(UserError, match="expected one of timm's normalizer-free models"):
        load_timm(nn.Linear(2, 2))
    with pytest.raises(UserError, match="attention gain"):
        load_timm(timm.create_model("test_nfnet", attn_gain=1.0))
    with pytest.raises(UserError, match="create_model did not build"):
        load_timm(TimmNormFreeNet(timm.models.nfnet.model_cfgs["test_nfnet"]))


def test_unrecorded_options_are_noticed() -> None:
    theirs = timm.create_model("test_nfnet", alpha=0.5)
    theirs._model_args = {}
    with pytest.raises(UserError, match=r"α=0\.5.*recorded as α=0\.2"):
        load_timm(theirs)


def test_only_timms_constants_can_go_back() -> None:
    with pytest.raises(UserError, match="constants"):
        to_timm_state_dict(create_model("nf_resnet20_cifar"))  # type: ignore[arg-type]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"depths": (2, 1, 1)}, r"missing stages\.1\.1\."),
        ({"attention": "se"}, r"unknown stages\.0\.0\.branch\.attn_last\.fc1\.weight"),
        ({"num_classes": 3}, r"head\.fc\.weight is 3x64, expected 10x64"),
        ({"gain_at": "conv"}, r"missing final_act\.0|missing final_act\.1\.value"),
    ],
)
def test_checkpoint_of_another_variant_names_the_keys(
    other: dict[str, Any], named: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = {"depths": (1, 2, 1)}
    model = create_model("nf_resnet20_cifar", **base)
    path = tmp_path / "other.pt"
    torch.save(create_model("nf_resnet20_cifar", **{**base, **other}).state_dict(), path)
    before = snapshot(model)
    with pytest.raises(UserError, match=named) as error:
        load_weights(model, path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_come_from_both_file_formats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = create_model("nf_resnet8_cifar")
    torch.save(source.state_dict(), tmp_path / "w.pt")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        model = create_model("nf_resnet8_cifar")
        load_weights(model, tmp_path / name)
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_unreadable_files(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="no such file"):
        load_weights(model, tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"not weights")
    with pytest.raises(UserError, match="not readable as weights"):
        load_weights(model, tmp_path / "bad.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="its entry 'epoch' is a int, no tensor"):
        load_weights(model, tmp_path / "other.pt")


def test_every_name_is_in_timms_registry() -> None:
    assert {f"nfnets_{name}" for name in list_models()} <= set(timm.list_models("nfnets_*"))
    assert register_with_timm() == []


def test_timm_tools_work_on_ours() -> None:
    model = timm.create_model("nfnets_nf_regnet_b0", num_classes=4, depths=(1, 1, 1, 1))
    assert resolve_data_config({}, model=model)["input_size"] == (3, 192, 192)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    plain, decayed = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4).param_groups
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in plain["params"]} == {0, 1}
    assert len(create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.7).param_groups) > 4


@pytest.mark.parametrize(
    "name", ["nfnets_bn_resnet8_cifar", "nfnets_fixup_resnet8_cifar", "nfnets_bn_fixup_resnet18"]
)
def test_timm_creates_the_other_families(name: str) -> None:
    model = timm.create_model(name, num_classes=4)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert model.pretrained_cfg["num_classes"] == 4


def test_timm_extracts_features() -> None:
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, channels in (
            ("nf_resnet26", [64, 256, 512, 1024, 2048]),
            ("bn_nf_resnet20_cifar", [16, 16, 32, 64]),
            ("fixup_resnet8_cifar", [16, 16, 32, 64]),
        ):
            extractor = timm.create_model(f"nfnets_{name}", features_only=True).eval()
            outputs = extractor(images)
            assert [feature.shape[1] for feature in outputs] == channels == extractor.feature_info.channels()
            sizes = [64 // feature.shape[-1] for feature in outputs]
            assert sizes == extractor.feature_info.reduction()


def test_no_weights_of_our_own() -> None:
    with pytest.raises(UserError, match="load_timm"):
        timm.create_model("nfnets_nf_resnet50", pretrained=True)


def test_a_users_model_can_be_registered_with_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    # on copies: other tests go over every name
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    monkeypatch.setattr(timm_registry, "default_cfgs", dict(timm_registry.default_cfgs))
    register("test_users_model", lambda num_classes=3: nn.Linear(2, num_classes))
    assert register_with_timm() == ["nfnets_test_users_model"]
    assert timm.create_model("nfnets_test_users_model", num_classes=5).out_features == 5
    with pytest.raises(UserError, match="features_only: expected one of nfnets' own networks, not a Linear"):
        timm.create_model("nfnets_test_users_model", features_only=True)
