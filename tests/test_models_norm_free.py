"""NF-ResNet, NF-RegNet, NFNet, ECA-NFNet: DeepMind's and timm's counts, constants, signal and twins."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import timm
import torch
from soak import ALL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nfnets.errors import UserError
from nfnets.layers import ScaledStdConv2d, SkipInit, StochasticDepth
from nfnets.models import CONFIGS, NormFreeConfig, NormFreeNet, create_model, list_models
from nfnets.models.blocks import Shortcut
from nfnets.models.parts import EfficientChannelAttention

# normalizer_free.md §3, §4, §9: parameters, and 10⁹ multiply-adds at the test resolution.
REGNET = {
    "nf_regnet_b0": (8_595_372, 0.4437),
    "nf_regnet_b1": (10_019_208, 0.7335),
    "nf_regnet_b2": (13_785_904, 1.0995),
    "nf_regnet_b3": (18_136_667, 1.9992),
    "nf_regnet_b4": (29_315_830, 4.4673),
    "nf_regnet_b5": (48_707_138, 10.5607),
    "nf_regnet_b6": (70_045_805, None),
    "nf_regnet_b7": (101_743_204, None),
    "nf_regnet_b8": (142_314_441, None),
}
NFNET = {
    "nfnet_f0": (71_489_284, 12.384, 6.977),
    "nfnet_f1": (132_634_256, 35.539, 17.438),
    "nfnet_f2": (193_779_228, 62.593, 33.139),
    "nfnet_f3": (254_924_200, 114.764, 67.944),
    "nfnet_f4": (316_069_172, 215.241, 121.122),
    "nfnet_f5": (377_214_144, 289.757, 169.498),
    "nfnet_f6": (438_359_116, 377.280, 228.293),
    "nfnet_f7": (499_504_088, 478.782, 298.477),
}
PLUS = (118824516, 220357008, 321889500, 423421992, 524954484, 626486976, 728019468, 829551960)
RESNET = {
    "nf_resnet26": (15_995_184, 2.342),
    "nf_resnet50": (25_557_048, 4.089),
    "nf_resnet101": (44_549_193, 7.801),
    "nf_resnet152": (60_192_858, 11.514),
    "nf_resnet200": (64_673_898, 15.007),
    "nf_resnet288": (146_460_552, 21.558),
    "nf_resnet600": (300_646_896, 44.269),
}
LIGHT = {
    "nfnet_l0": 35_074_488,
    "eca_nfnet_l0": 24_143_924,
    "eca_nfnet_l1": 41_407_728,
    "eca_nfnet_l2": 56_722_348,
    "eca_nfnet_l3": 72_036_968,
}


def thin(members: Iterable[Any]) -> list[Any]:
    """One rule makes a family's members: the first, the third and the last in `make test`, all in `make soak`."""
    every = list(members)
    return every if ALL else [every[0], every[2], every[-1]]


def on_meta(name: str, **options: Any) -> NormFreeNet:
    with torch.device("meta"):
        model = create_model(name, **options)
    assert isinstance(model, NormFreeNet)
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def operations(model: NormFreeNet, size: float) -> float:
    """10⁹ multiply-adds of convolutions and linears, by DeepMind's closed form: maps are halved without rounding."""
    total = 0.0

    def add(conv: nn.Module, at: float) -> float:
        nonlocal total
        assert isinstance(conv, nn.Conv2d)
        at /= conv.stride[0]
        total += conv.weight.numel() * at**2
        return at

    for layer in model.stem:
        size = add(layer, size) if isinstance(layer, nn.Conv2d) else size
        size = size / 2 if isinstance(layer, nn.MaxPool2d) else size
    for block in model.blocks():
        before = size
        for layer in block.branch:
            size = add(layer, size) if isinstance(layer, nn.Conv2d) else size
        if isinstance(block.downsample, Shortcut):
            add(block.downsample.conv, before if block.downsample.conv.stride[0] > 1 else size)  # type: ignore[index]
    if isinstance(model.final_conv, nn.Conv2d):
        add(model.final_conv, size)
    return (total + sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))) / 1e9


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_regnet_b0", "nfnet_f0", "eca_nfnet_l0"])
def test_closed_form_is_what_runs(name: str) -> None:
    model = on_meta(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, 256, 256, device="meta"))
    taps = sum(  # ECA's 1-D convolutions over channels
        m.conv.weight.numel() * block.branch.conv3.out_channels  # type: ignore[union-attr, operator]
        for block in model.blocks()
        for m in block.branch
        if isinstance(m, EfficientChannelAttention)
    )
    assert counter.get_total_flops() / 2 == operations(model, 256) * 1e9 + taps


@pytest.mark.parametrize("name", thin(RESNET))
def test_nf_resnet_counts(name: str) -> None:
    model = on_meta(name)
    assert parameters(model) == RESNET[name][0]
    assert operations(model, 224) == pytest.approx(RESNET[name][1], abs=0.0006)


@pytest.mark.parametrize("name", thin(REGNET))
def test_nf_regnet_counts(name: str) -> None:
    model = on_meta(name)
    count, macs = REGNET[name]
    assert parameters(model) == count
    if macs is not None:
        assert operations(model, model.config.test_size) == pytest.approx(macs, abs=0.00006)


@pytest.mark.parametrize("name", thin(NFNET))
def test_nfnet_counts(name: str) -> None:
    model = on_meta(name)
    count, test_macs, train_macs = NFNET[name]
    assert parameters(model) == count
    assert operations(model, model.config.test_size) == pytest.approx(test_macs, abs=0.0006)
    assert operations(model, model.config.train_size) == pytest.approx(train_macs, abs=0.0006)


@pytest.mark.parametrize("index", thin(range(8)))
def test_nfnet_plus_counts(index: int) -> None:
    assert parameters(on_meta(f"nfnet_f{index}+")) == PLUS[index]


@pytest.mark.parametrize("name", LIGHT)
def test_timm_light_counts(name: str) -> None:
    assert parameters(on_meta(name)) == LIGHT[name]


def test_ablations_of_f0() -> None:
    assert parameters(on_meta("nfnet_f0", extra_conv=False)) == 62_774_276
    final = {"widths": (256, 512, 1024, 2048), "final_width": 4096}
    assert parameters(on_meta("nfnet_f0", **final)) == 68_638_724
    assert parameters(on_meta("nf_resnet50", attention="se")) == 35_635_704


def test_parameters_of_f0_by_kind() -> None:
    model = on_meta("nfnet_f0")
    convs = [m for m in model.modules() if isinstance(m, ScaledStdConv2d)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert sum(m.weight.numel() for m in [*convs, *linears]) == 71_375_792
    assert sum(m.gain.numel() for m in convs) == 44_912
    assert sum(m.bias.numel() for m in convs if m.bias is not None) == 44_912
    assert sum(m.bias.numel() for m in linears) == 23_656
    assert sum(m.gain.numel() for m in model.modules() if isinstance(m, SkipInit)) == 12


@pytest.mark.parametrize(
    ("name", "count"), [(50, 25_549_352), (101, 44_541_480), (152, 60_185_128), (200, 64_666_152)]
)
def test_batchnorm_twins_are_deepminds_comparators(name: int, count: int) -> None:
    assert parameters(on_meta(f"bn_nf_resnet{name}")) == count


FAMILIES = (
    "nf_resnet18",
    "nf_resnet26",
    "nf_resnet20_cifar",
    "nf_regnet_b1",
    "nfnet_f0",
    "eca_nfnet_l0",
    "nfnet_l0",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_twin_has_the_same_convolutions_and_no_constants(name: str) -> None:
    ours, twin = on_meta(name), on_meta(f"bn_{name}")
    shapes = [[tuple(p.shape) for n, p in m.named_parameters() if p.ndim == 4] for m in (ours, twin)]
    assert shapes[0] == shapes[1]
    assert not [n for n, _ in twin.named_buffers() if not n.endswith(("_mean", "_var", "tracked"))]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    activations = [m for m in ours.modules() if isinstance(m, nn.ReLU | nn.SiLU | nn.GELU)]
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    inside_gates = sum(n.endswith("fc1") for n, _ in ours.named_modules())
    assert len(norms) == len(activations) - inside_gates


@pytest.mark.parametrize(("ours", "theirs"), [("nf_resnet101", "nf_resnet101"), ("nfnet_f1", "dm_nfnet_f1")])
def test_betas_are_timms(ours: str, theirs: str) -> None:
    with torch.device("meta"):
        reference = timm.create_model(theirs)
    betas = [block.beta for stage in reference.stages for block in stage]  # type: ignore[union-attr]
    assert [1 / beta for beta in CONFIGS[ours].betas()] == pytest.approx(betas, rel=1e-12)


def test_inverse_betas_of_the_sheet() -> None:
    config = NormFreeConfig((7, 1), (64, 64), strides=(1, 2))
    expected = [1, 0.980581, 0.962250, 0.944911, 0.928477, 0.912871, 0.898027, 1 / math.sqrt(1.28)]
    assert [1 / beta for beta in config.betas()] == pytest.approx(expected, abs=5e-7)


def reference_forward(block: nn.Module, h: Tensor, gamma: float, beta: float) -> Tensor:
    """A bottleneck block of the sheet, §3: activation, then gain, then 1/β; each filter standardized by hand."""

    def conv(layer: ScaledStdConv2d, x: Tensor) -> Tensor:
        w = layer.weight.flatten(1)
        w = (w - w.mean(1, keepdim=True)) / (w.var(1, correction=0, keepdim=True) * w.shape[1]).clamp_min(
            1e-4
        ).sqrt()
        w = (w * layer.gain[:, None]).reshape(layer.weight.shape)
        assert isinstance(layer.padding, tuple)
        return nn.functional.conv2d(x, w, layer.bias, layer.stride, layer.padding)

    branch: Any = block.branch
    a = nn.functional.relu(h) * gamma / beta
    shortcut = h if block.downsample is None else conv(block.downsample.conv, a)  # type: ignore[union-attr, arg-type]
    x = conv(branch.conv1, a)
    x = conv(branch.conv2, nn.functional.relu(x) * gamma)
    x = conv(branch.conv3, nn.functional.relu(x) * gamma)
    return shortcut + 0.2 * branch.skip.gain * x


@pytest.mark.parametrize("index", [0, 1, 2])
def test_block_is_the_papers(index: int) -> None:
    torch.manual_seed(index)
    model = create_model("nf_resnet26").double()
    assert isinstance(model, NormFreeNet)
    for name, parameter in model.named_parameters():
        if name.endswith(("gain", "bias")):
            nn.init.normal_(parameter, 0.5)
    block, beta = model.blocks()[index], model.config.betas()[index]
    h = torch.randn(2, (64, 256, 256)[index], 9, 9, dtype=torch.float64)
    gamma = math.sqrt(2 / (1 - 1 / math.pi))
    # Constants are fp32 numbers before `.double()`.
    torch.testing.assert_close(block(h), reference_forward(block, h, gamma, beta), rtol=1e-6, atol=1e-6)


def test_blocks_without_transition_are_identities_at_first() -> None:
    model = create_model("nf_regnet_b0")
    assert isinstance(model, NormFreeNet)
    kept = [block for block in model.blocks() if block.downsample is None]
    assert len(kept) == sum(model.config.depths) - 4
    for block in kept:
        h = torch.randn(2, block.branch.conv1.in_channels, 4, 4)  # type: ignore[union-attr]
        assert torch.equal(block(h), h)


def test_signal_of_nf_resnet50_is_the_sheets() -> None:
    """normalizer_free.md §6: variance at each stage's end with s=1, 224 px, N(0, 1) input."""
    torch.manual_seed(0)
    model = create_model("nf_resnet50").eval()
    assert isinstance(model, NormFreeNet)
    for block in model.blocks():
        nn.init.ones_(block.branch.skip.gain)  # type: ignore[union-attr, arg-type]
    variances, squared_means = [], []
    with torch.no_grad():
        h = model.stem(torch.randn(2, 3, 224, 224))
        for stage in model.stages:
            h = stage(h)
            variances.append(h.var((0, 2, 3)).mean().item())
            squared_means.append(h.mean((0, 2, 3)).square().mean().item())
    assert variances == pytest.approx([1.141, 1.175, 1.243, 1.098], rel=0.1)
    assert max(squared_means[:3]) < 0.03


def test_norm_free_samples_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    for name, independent in (("nf_resnet20_cifar", True), ("bn_nf_resnet20_cifar", False)):
        model = create_model(name).train()
        for module in model.modules():
            if isinstance(module, SkipInit):
                nn.init.ones_(module.gain)
        with torch.no_grad():
            alone, together = model(images[:1]), model(images)[:1]
        assert torch.allclose(alone, together, atol=1e-5) == independent


def test_stochastic_depth_grows_with_depth() -> None:
    model = create_model("nf_resnet20_cifar", drop_path_rate=0.9)
    assert isinstance(model, NormFreeNet)
    rates = [getattr(block.branch, "drop_path", StochasticDepth(0.0)).rate for block in model.blocks()]
    assert rates == pytest.approx([0.9 * i / 9 for i in range(9)])


@pytest.mark.parametrize(
    "name", ["nf_resnet18_cifar", "nf_regnet_b0", "nfnet_f0", "eca_nfnet_l0", "bn_nf_regnet_b0"]
)
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    slim: dict[str, Any] = {"depths": (1, 2, 1, 1), "widths": (32, 64, 64, 96), "stem_width": 32}
    slim |= {"group_width": None if "resnet" in name else 8, "num_classes": 5}
    model = create_model(name, **slim)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gain") or parameter_name == "head.fc.weight":
            nn.init.normal_(parameter)
        if parameter_name.endswith("fc1.bias"):
            nn.init.ones_(parameter)  # keeps the gate's ReLU open
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 3, 1, 2]))
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model = create_model("nf_resnet8_cifar")
    assert isinstance(model, NormFreeNet)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    images = torch.randn(2, 3, 16, 16)
    for net in (model, twin):
        net(images).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_copies_and_pickles_give_the_same_outputs() -> None:
    torch.manual_seed(0)
    model = create_model("nf_regnet_b0", depths=(1, 1, 1, 1)).eval()
    nn.init.normal_(model.get_classifier().weight)  # type: ignore[operator, union-attr]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        assert expected.any()
        assert torch.equal(copy.deepcopy(model)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)


def test_classifier_can_be_replaced() -> None:
    model = create_model("nf_resnet20_cifar")
    assert isinstance(model, NormFreeNet)
    model.reset_classifier(3)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 64)
    features = model.forward_features(torch.randn(2, 3, 16, 16))
    assert model.forward_head(features, pre_logits=True).shape == (2, 64)


def test_undecayed_are_gains_biases_and_scalars() -> None:
    model = create_model("nf_resnet8_cifar")
    assert isinstance(model, NormFreeNet)
    decayed = {name for name, _ in model.named_parameters()} - model.no_weight_decay()
    assert {name.rpartition(".")[2] for name in decayed} == {"weight"}
    assert {name.rpartition(".")[2] for name in model.no_weight_decay()} == {"gain", "bias"}


BAD: dict[str, dict[str, Any]] = {
    "did you mean attention": {"atention": "se"},
    "as many of each": {"depths": (1, 2)},
    "expected positive": {"depths": (1, 0, 1, 1)},
    "group": {"group_width": 128},
    "probabilities": {"drop_rate": 1.0},
    "0 or more classes": {"num_classes": -1},
    "unknown activation 'rellu': did you mean relu": {"activation": "rellu"},
    "no middle": {"block": "basic", "extra_conv": True},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("nf_resnet50", **BAD[message])


def test_every_published_member_has_a_name() -> None:
    names = {f"nf_resnet{d}" for d in (18, 34, 26, 50, 101, 152, 200, 288, 600)}
    names |= {f"nf_regnet_b{i}" for i in range(9)} | {f"eca_nfnet_l{i}" for i in range(4)}
    names |= {f"nfnet_f{i}{plus}" for i in range(8) for plus in ("", "_plus")}
    names |= {f"nf_resnet{d}_cifar" for d in (20, 32, 56, 110, 18, 50)}
    known = set(list_models())
    assert names <= known
    assert {f"bn_{name}" for name in names} <= known
