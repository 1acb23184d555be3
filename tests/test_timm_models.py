"""What timm's own model tests check (its `tests/test_models.py`), on our models and on converted ones of timm.

`NFNETS_GRID=all` (`make soak`) runs every model and every conversion method; otherwise one of each kind. TorchScript is
the one thing timm tests that is not here: torch has deprecated it, and what it cannot script is in docs/limitations.md.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import timm
import torch
import torchvision
from soak import ALL
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules, group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import nfnets
from nfnets.blocks import StochasticDepth
from nfnets.convert import ConversionError, list_methods
from nfnets.errors import UserError
from nfnets.models import CONFIGS, create_model, list_models
from nfnets.models.timm_registry import _features

PREFIX = "nfnets_"
SLIM: dict[str, Any] = {"depths": (1, 2, 1, 1), "widths": (64, 64, 128, 128), "group_width": 16}
# One of every family, twin and block; wide ones with fewer channels.
MEMBERS: dict[str, dict[str, Any]] = {
    "nf_resnet8_cifar": {},
    "bn_nf_resnet8_cifar": {},
    "bn_nf_resnet26": {"widths": (32, 64, 64, 128)},
    "nf_resnet18": {},
    "nf_resnet26": {"widths": (32, 64, 64, 128)},
    "nf_regnet_b0": {"final_width": 256},
    "bn_nf_regnet_b0": {"final_width": 256},
    "nfnet_f0": SLIM | {"final_width": 256},
    "bn_nfnet_f0": SLIM | {"final_width": 256},
    "nfnet_l0": SLIM | {"final_width": 256},
    "eca_nfnet_l0": SLIM | {"final_width": 256},
    "fixup_resnet8_cifar": {},
    "fixup_resnet18": {},
    "fixup_resnet50": {},
    "bn_resnet8_cifar": {},
    "bn_fixup_resnet8_cifar": {},
    "bn_fixup_resnet18": {},
    "bn_fixup_resnet50": {},
}
REST = {"nf_resnet18", "bn_nf_regnet_b0", "bn_nfnet_f0", "nfnet_l0", "fixup_resnet18", "fixup_resnet50"}
REST |= {"bn_nf_resnet26", "bn_fixup_resnet8_cifar", "bn_fixup_resnet50"}
members = pytest.mark.parametrize("name", [name for name in MEMBERS if ALL or name not in REST])


def member(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(PREFIX + name, **MEMBERS[name], **options)


def wake(model: nn.Module) -> nn.Module:
    """Give what starts at zero (branches, heads) a value, so that every path is seen in outputs and gradients."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


# -- configurations: every name, without weights ------------------------------------------------------------------


def configurations() -> list[str]:
    """All names, or every second one of the smallest of each family: depth changes nothing here."""
    deep = r"resnet(101|110|152|164|200|288|600|1202)|_b[1-8]|_f[1-7]|_l[1-3]|resnet(14|20|32|44|56)_|resnet34|_plus"
    return [name for name in list_models() if not re.search(deep, name)][::2] if not ALL else list_models()


def shallow(name: str) -> dict[str, Any]:
    """A block a stage, where depths can be chosen."""
    config = CONFIGS.get(name.removeprefix("bn_"))
    return {} if ALL or config is None else {"depths": (1,) * len(config.depths)}


@pytest.mark.parametrize("name", configurations())
def test_the_default_configuration_is_the_modules(name: str) -> None:
    with torch.device("meta"):
        small = shallow(name)
        model: Any = timm.create_model(PREFIX + name, **small).eval()
        config = model.default_cfg
        image = torch.zeros(1, *config["input_size"])
        names = model.state_dict().keys()
        assert f"{config['classifier']}.weight" in names
        assert f"{config['first_conv']}.weight" in names
        assert model.get_classifier() is model.get_submodule(config["classifier"])
        assert model.num_classes == config["num_classes"] == model(image).shape[1]

        features = model.forward_features(image)
        assert features.shape == (1, model.num_features, *config["pool_size"])
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert model(image).shape == pooled.shape
        model.reset_classifier(0, "")
        assert model(image).shape == features.shape
        bare: Any = timm.create_model(PREFIX + name, num_classes=0, global_pool="", **small).eval()
        assert bare(image).shape == features.shape
        bare.reset_classifier(7, "avg")
        assert bare(image).shape == (1, 7)


def test_every_name_has_feature_levels() -> None:
    with torch.device("meta"):
        for name in configurations():
            info = FeatureInfo(create_model(name).feature_info, 1)  # type: ignore[arg-type]
            assert len(info.info) >= 4, name


# -- forward and backward -----------------------------------------------------------------------------------------


@members
@pytest.mark.parametrize("channels", [1, 3] if ALL else [1])
def test_every_parameter_gets_a_gradient(name: str, channels: int) -> None:
    model = wake(member(name, num_classes=42, in_chans=channels)).train()
    outputs = model(torch.randn(2, channels, 64, 64))
    assert outputs.shape == (2, 42)
    outputs.square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
    assert model.default_cfg["input_size"][0] == channels  # type: ignore[index]


@members
def test_recomputation_changes_no_output_and_no_gradient(name: str) -> None:
    plain = wake(member(name, num_classes=5)).eval()
    again: Any = copy.deepcopy(plain)
    again.set_grad_checkpointing()
    images = torch.randn(2, 3, 64, 64)
    outputs, same = plain(images), again(images)
    torch.testing.assert_close(same, outputs)
    outputs.square().sum().backward()
    same.square().sum().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    again.set_grad_checkpointing(False)
    assert not again.grad_checkpointing


@members
def test_rates_of_dropping(name: str) -> None:
    model = wake(member(name, num_classes=5, drop_rate=0.5, drop_path_rate=0.6))
    rates = [module.rate for module in model.modules() if isinstance(module, StochasticDepth)]
    assert rates == sorted(rates)
    assert 0 < rates[0] <= rates[-1] < 0.6
    images = torch.randn(2, 3, 64, 64)
    model.train()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    # Without dropout, what is random is the depth; without depth, nothing is.
    deep = wake(member(name, num_classes=5, drop_path_rate=0.6)).train()
    passes = torch.stack([deep(images) for _ in range(4)])
    assert not torch.equal(passes, passes[:1].expand_as(passes))
    for module in (*deep.modules(), *model.modules()):
        if isinstance(module, StochasticDepth):
            module.rate = 0.0
    torch.testing.assert_close(deep(images), deep(images), rtol=0, atol=0)
    torch.manual_seed(0)
    features = model.train().forward_head(torch.ones(64, model.num_features, 2, 2), pre_logits=True)  # type: ignore
    assert (features == 0).float().mean().item() == pytest.approx(0.5, abs=0.1), (
        "dropout before the classifier"
    )
    with pytest.raises(UserError, match="probabilities under 1"):
        member(name, drop_path_rate=1.0)


def test_stochastic_depth_of_the_twins_keeps_the_mean() -> None:
    """Rescaled, as timm's DropPath does: with all branches kept or dropped, the mean is the whole branch's."""
    block = create_model("bn_resnet14_cifar", drop_path_rate=0.5).layer3[1]  # type: ignore[index]
    drop: Any = block.drop_path
    branch = torch.ones(4000, 1)
    torch.manual_seed(0)
    assert drop.train()(branch).mean().item() == pytest.approx(1, abs=0.05)
    images = torch.randn(4, 64, 4, 4)
    drop.rate = 1.0
    torch.testing.assert_close(block.train()(images), images.relu())


def test_the_twins_without_rates_are_torchvisions() -> None:
    for depth in (18, 50):
        torch.manual_seed(0)
        ours = create_model(f"bn_fixup_resnet{depth}", num_classes=5).eval()
        theirs = torchvision.models.get_model(f"resnet{depth}", weights=None, num_classes=5).eval()
        theirs.load_state_dict(ours.state_dict())
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)


@members
def test_state_dict_round_trip(name: str) -> None:
    model, other = wake(member(name, num_classes=5)).eval(), member(name, num_classes=5).eval()
    images = torch.randn(1, 3, 64, 64)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images), other(images))


def test_timm_loads_a_file_of_weights(tmp_path: Any) -> None:
    source = wake(member("nf_resnet8_cifar"))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    where = {"file": str(tmp_path / "weights.pth")}
    loaded = timm.create_model("nfnets_nf_resnet8_cifar", pretrained=True, pretrained_cfg_overlay=where)
    direct = timm.create_model("nfnets_nf_resnet8_cifar", checkpoint_path=str(tmp_path / "weights.pth"))
    images = torch.randn(1, 3, 32, 32)
    for model in (loaded, direct):
        assert torch.equal(model.eval()(images), source.eval()(images))


# -- features -----------------------------------------------------------------------------------------------------


def holds(outputs: list[Tensor], info: Any, size: int) -> None:
    assert len(outputs) == len(info.channels()) == len(info.reduction())
    for output, channels, reduction in zip(outputs, info.channels(), info.reduction(), strict=True):
        assert output.shape[1] == channels
        assert all(side <= math.ceil(size / reduction) + 1 for side in output.shape[2:])
        assert all(side >= size // reduction for side in output.shape[2:])
        assert output.isfinite().all()


@members
def test_every_extractor_gives_the_same_features(name: str) -> None:
    model = wake(member(name)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        _, expected = model.forward_intermediates(images)
        for kind in ("getter", "hook", "list", "dict"):
            extractor: Any = _features(copy.deepcopy(model), None, kind).eval()
            outputs = extractor(images)
            outputs = list(outputs.values()) if kind == "dict" else outputs
            holds(outputs, extractor.feature_info, 64)
            for one, other in zip(outputs, expected, strict=True):
                torch.testing.assert_close(one, other)


def test_extractors_by_name() -> None:
    images = torch.randn(1, 1, 64, 64)
    outputs = []
    for kind in ("getter", "hook", "list", "dict"):
        extractor: Any = member("nf_resnet18", features_only=True, feature_cls=kind, in_chans=1).eval()
        outputs.append(extractor(images))
        assert "classifier" not in extractor.default_cfg
        assert extractor.default_cfg["input_size"] == (1, 224, 224)
    for first, other in zip(outputs[0], outputs[1], strict=True):
        torch.testing.assert_close(first, other)
    with pytest.raises(UserError, match="did you mean getter"):
        member("nf_resnet18", features_only=True, feature_cls="geter")


@members
def test_chosen_features(name: str) -> None:
    images = torch.randn(1, 3, 64, 64)
    for wanted, count in (((1, 3), 2), ((-1,), 1), (2, 2), ((0,), 1)):
        extractor: Any = member(name, features_only=True, out_indices=wanted).train()
        outputs = extractor(images)
        assert len(outputs) == count
        holds(outputs, extractor.feature_info, 64)
        torch.stack([output.square().mean() for output in outputs]).sum().backward()
        used = [path for path, p in extractor.named_parameters() if p.grad is None]
        assert used == [], "what is left over after pruning"


@members
def test_intermediates(name: str) -> None:
    model = wake(member(name)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        final, every = model.forward_intermediates(images)
        holds(every, FeatureInfo(model.feature_info, len(model.feature_info)), 64)
        assert torch.equal(final, model.forward_features(images))
        assert all(
            torch.equal(a, b)
            for a, b in zip(every, model.forward_intermediates(images, norm=True)[1], strict=True)
        )
        only = model.forward_intermediates(images, indices=[1, -1], intermediates_only=True)
        assert [torch.equal(a, b) for a, b in zip(only, (every[1], every[-1]), strict=True)] == [True] * 2
        for index, expected in enumerate(every):
            _, (early,) = model.forward_intermediates(images, indices=[index], stop_early=True)
            assert torch.equal(early, expected)
        before = {path: id(module) for path, module in model.named_modules()}
        for bad in ([len(every)], [-9], 0, 99, []):
            with pytest.raises(UserError, match="expected some of 0"):
                model.prune_intermediate_layers(bad)
        with pytest.raises(UserError, match="NCHW"):
            model.forward_intermediates(images, output_fmt="NLC")
        assert before == {path: id(module) for path, module in model.named_modules()}
        for index, expected in enumerate(every):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([index - len(every)]) == [index]
            torch.testing.assert_close(
                pruned.forward_features(images), final if index == len(every) - 1 else expected
            )
            assert pruned(images).shape[1] == pruned.num_features == pruned.head_hidden_size
            torch.testing.assert_close(pruned.forward_intermediates(images, [index])[1][0], expected)
            pruned.reset_classifier(3, "avg")
            assert pruned(images).shape == (1, 3)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("nf_resnet26", "nf_resnet26"),
        ("eca_nfnet_l0", "eca_nfnet_l0"),
        ("nfnet_f0", "dm_nfnet_f0"),
    ],
)
def test_feature_levels_are_timms(ours: str, theirs: str) -> None:
    with torch.device("meta"):
        mine, other = create_model(ours).feature_info, timm.create_model(theirs).feature_info
    keys = ("num_chs", "reduction", "module")
    assert [[info[key] for key in keys] for info in mine] == [[info[key] for key in keys] for info in other]  # type: ignore


def test_intermediates_are_timms() -> None:
    theirs: Any = timm.create_model("test_nfnet").eval()
    ours: Any = nfnets.models.load_timm(theirs)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(
            ours.forward_intermediates(images, intermediates_only=True),
            theirs.forward_intermediates(images, intermediates_only=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# -- optimizers, graphs -------------------------------------------------------------------------------------------


@members
def test_parameter_groups(name: str) -> None:
    model = member(name)
    groups = group_parameters(model, model.group_matcher())
    found = [parameter for group in groups.values() for parameter in group]
    assert sorted(found) == sorted(path for path, _ in model.named_parameters())
    blocks = sum(len(stage) for stage in model.parts().stages)
    necks = int(hasattr(model, "final_conv") and isinstance(model.final_conv, nn.Conv2d))
    assert len(groups) == 1 + blocks + 1, "stem, blocks (the last with what follows it), head"
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == len(model.parts().stages) + 2
    assert necks == any("final_conv" in path for path in groups[blocks])
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0 or all(parameter.ndim > 1 for parameter in group["params"])
    assert min(group["lr_scale"] for group in optimizer.param_groups) == 0.5 ** (len(groups) - 1)


def symbolic(model: nn.Module) -> nn.Module:
    leaves: dict[str, Any] = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=leaves)
    return create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=leaves
    )


@members
def test_fx(name: str) -> None:
    model = wake(member(name, num_classes=5))
    images = torch.randn(2, 3, 64, 64)
    traced = symbolic(model)
    with torch.no_grad():
        (outputs,) = traced.eval()(images).values()
        assert torch.equal(outputs, model.eval()(images))
    (outputs,) = traced.train()(images).values()
    outputs.square().mean().backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())


# -- converted models ---------------------------------------------------------------------------------------------

THEIRS = {
    "test_resnet": "nf",
    "test_efficientnet": "fold",
    "test_byobnet": "lsuv",
    "regnetx_002": "gn",
    "mobilenetv3_small_050": "nf",
    "densenet121": "gn",
    "ese_vovnet19b_slim_dw": "fold",
    "resnetv2_18": "nf",
    "vgg11_bn": "lsuv",
    "ghostnet_050": "fold",
    "repvgg_a0": "nf",
    "hardcorenas_a": "lsuv",
    "dla34": "gn",
}
METHODS = sorted(list_methods()) if ALL else ["fold", "gn", "lsuv", "nf"]
UNBRANCHED = {
    "test_efficientnet",
    "densenet121",
    "ese_vovnet19b_slim_dw",
    "vgg11_bn",
}  # nothing for fixup, skipinit
DEEP = {"densenet121", "dla34", "hardcorenas_a", "repvgg_a0", "ghostnet_050", "vgg11_bn"}  # seconds each
PAIRS = [
    (name, method)
    for name in THEIRS
    for method in METHODS
    if ALL or (THEIRS[name] == method and name not in DEEP)
]


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_converted_model_of_timm_is_one(name: str, method: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    original: Any = timm.create_model(name, num_classes=42)
    if method in ("fixup", "skipinit") and name in UNBRANCHED:
        with pytest.raises(ConversionError, match="no residual branch"):
            nfnets.convert(original, images, method=method)
        return
    model: Any = nfnets.convert(original.eval() if method == "fold" else original, images, method=method)
    assert norms(model) <= norms(original) * (method == "fold")
    config = model.default_cfg
    for key in ("classifier", "first_conv"):
        named = (config[key],) if isinstance(config[key], str) else config[key]  # RepVGG's stem has two
        assert all(f"{path}.weight" in model.state_dict() for path in named)

    outputs = model.train()(images)
    assert outputs.shape == (4, 42)
    outputs.square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
    assert sorted(
        p for group in group_parameters(model, model.group_matcher()).values() for p in group
    ) == sorted(path for path, _ in model.named_parameters())

    model.eval()
    with torch.no_grad():
        outputs = model(images)
        features = model.forward_features(images)
        assert features.shape[1] == model.num_features
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape[1] == model.head_hidden_size
        if method != "ghost_bn":  # in training its number of chunks depends on the batch: docs/limitations.md
            torch.testing.assert_close(symbolic(model)(images).popitem()[1], outputs, rtol=0, atol=0)
        if hasattr(model, "forward_intermediates"):
            final, found = model.forward_intermediates(images)
            holds(found, FeatureInfo(model.feature_info, len(model.feature_info)), 64)
            torch.testing.assert_close(final, features)
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError):  # theirs has none
            pass
        else:
            torch.testing.assert_close(model(images), outputs, rtol=1e-4, atol=1e-5)
            model.set_grad_checkpointing(False)
        twin = nfnets.convert(
            timm.create_model(name, num_classes=42).eval(), torch.randn(4, 3, 64, 64), method=method
        )
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(twin.eval()(images), outputs)
        model.reset_classifier(0)
        assert model(images).shape == pooled.shape
        model.reset_classifier(7)
        assert model(images).shape == (4, 7)


@pytest.mark.parametrize("method", METHODS)
def test_an_extractor_of_timm_is_converted(method: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    extractor: Any = timm.create_model("test_resnet", features_only=True).eval()
    converted: Any = nfnets.convert(extractor, images, method=method)
    assert norms(converted) == 0
    holds(converted(images), converted.feature_info, 64)
    if method == "fold":
        for one, other in zip(converted(images), extractor(images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_family_is_forgotten() -> None:
    def family(name: str) -> str:
        return re.sub(r"\d+", "", name.removesuffix("_plus"))

    twins = {
        "bn_nfnet_l",
        "bn_eca_nfnet_l",
    }  # one network, as bn_nfnet_f: with norm layers γ and α mean nothing
    missing = {family(name) for name in list_models()} - {family(name) for name in MEMBERS}
    assert missing - twins == set(), missing
