"""Names, errors and the BatchNorm ResNets for small images."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from nfnets.errors import UserError
from nfnets.models import create_model, list_models, register

# He et al. (arXiv 1512.03385, table 6: 0.27, 0.46, 0.85, 1.7 M) count parameter-free shortcuts; projections
# add 16·32 + 32·64 weights and 2·(32 + 64) BN parameters.
OPTION_A = {20: 269_722, 32: 464_154, 56: 853_018, 110: 1_727_962}


@pytest.mark.parametrize("depth", OPTION_A)
def test_parameters_of_cifar_resnets(depth: int) -> None:
    with torch.device("meta"):
        model = create_model(f"bn_resnet{depth}_cifar")
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert sum(p.numel() for p in model.parameters()) == OPTION_A[depth] + projections
    convs_and_linears = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len([n for n in convs_and_linears if "downsample" not in n]) == depth


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_cifar_resnet_trains_on_small_images(size: int, channels: int) -> None:
    torch.manual_seed(0)
    model = create_model("bn_resnet8_cifar", num_classes=5, in_chans=channels)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    images, labels = torch.randn(10, channels, size, size), torch.arange(10) % 5
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_width_scales_channels_and_blocks_are_torchvisions() -> None:
    model = create_model("bn_resnet14_cifar", width=2.5)
    assert [model.get_submodule(f"layer{i}.0.conv1").out_channels for i in (1, 2, 3)] == [40, 80, 160]
    assert sum(isinstance(m, BasicBlock) for m in model.modules()) == 6


def test_he_initialization_by_fan_out() -> None:
    torch.manual_seed(0)
    weight = create_model("bn_resnet20_cifar", width=4).layer3[1].conv1.weight  # type: ignore[index]
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown model 'bn_resnet21_cifar': .*mean .*bn_resnet20_cifar"):
        create_model("bn_resnet21_cifar")


def test_unknown_argument_names_the_known() -> None:
    with pytest.raises(UserError, match=r"'classes'.*it takes num_classes, in_chans, width"):
        create_model("bn_resnet8_cifar", classes=3)


@pytest.mark.parametrize("bad", [{"num_classes": -1}, {"in_chans": 0}, {"width": 0.01}])
def test_bad_arguments(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected positive"):
        create_model("bn_resnet8_cifar", **bad)


def test_list_models_patterns_and_taken_names() -> None:
    assert list_models("bn_resnet*0_cifar") == ["bn_resnet110_cifar", "bn_resnet20_cifar"]
    assert list_models("no such*") == []
    with pytest.raises(UserError, match="already registered"):
        register("bn_resnet20_cifar", nn.Identity)
    for name in ("", "  "):
        with pytest.raises(UserError, match="expected a name"):
            register(name, nn.Identity)


@pytest.mark.parametrize(
    "name", ["bn_resnet8_cifar", "fixup_resnet8_cifar", "bn_fixup_resnet18", "nf_resnet8_cifar"]
)
def test_heads_follow_timms_conventions(name: str) -> None:
    """What timm's own `test_model_default_cfgs` asks of a model."""
    model = create_model(name, in_chans=1)
    images = torch.randn(2, 1, 64, 64)
    features = model.forward_features(images)  # type: ignore[operator]
    assert features.shape[1] == model.num_features
    pooled = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(pooled.flatten(1), features.mean((2, 3)))
    model.reset_classifier(3)  # type: ignore[operator]
    assert model(images).shape == (2, 3)
    model.reset_classifier(0, "")  # type: ignore[operator]
    assert model(images).shape == features.shape
    assert create_model(name, num_classes=0, global_pool="", in_chans=1)(images).shape == features.shape


@pytest.mark.parametrize("name", ["bn_resnet8_cifar", "fixup_resnet8_cifar", "bn_fixup_resnet18"])
def test_unpooled_features_have_no_classifier(name: str) -> None:
    with pytest.raises(UserError, match="num_classes=0"):
        create_model(name, num_classes=5, global_pool="")
