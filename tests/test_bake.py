"""A baked model is a plain one that computes the same."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from test_layers import CASES, plain_of, randomized
from torch import Tensor, nn

import nfnets
from nfnets.convert import list_methods
from nfnets.convert.bake import bake
from nfnets.errors import UserError
from nfnets.layers import (
    Scale,
    ScaledStdConv2d,
    ScaledStdConvTranspose2d,
    ScaledStdLinear,
    SkipInit,
    SqueezeExcite,
    _ScaledStd,
    scaled_std_class,
)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).detach().norm()) <= 1e-5 * float(expected.detach().norm())


class Block(nn.Module):
    """A residual block with everything that a normalizer-free network has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ScaledStdConv2d(3, 8, 3, stride=2, padding="tf_same")
        self.down = Scale(0.9)
        self.conv = ScaledStdConv2d(8, 8, 3, padding=1, groups=2, scale=1.7)
        self.se = SqueezeExcite(8)
        self.skip = SkipInit(0.7)
        self.up = ScaledStdConvTranspose2d(8, 4, 2, stride=2, alpha=0.5)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), ScaledStdLinear(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.skip(self.se(self.conv(self.down(x).relu())))
        return self.head(self.up(x))


def block() -> Block:
    torch.manual_seed(0)
    return randomized(Block())


@pytest.mark.parametrize(("cls", "arguments", "shape"), CASES)
def test_each_layer_becomes_torchs_own(cls: type, arguments: dict, shape: tuple) -> None:
    layer = randomized(cls(**arguments, scale=1.7, alpha=0.5))
    baked = bake(layer)
    assert type(baked) is plain_of(cls)
    x = torch.randn(shape)
    assert_same(baked(x), layer(x))
    assert (baked.bias is None) == (layer.bias is None)


@pytest.mark.parametrize("training", [True, False])
def test_the_function_and_the_paths_stay(training: bool) -> None:
    model = block().train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    baked = bake(model)
    x = torch.randn(2, 3, 9, 9)
    assert_same(baked(x), model(x))
    assert [name for name, _ in baked.named_modules()] == [name for name, _ in model.named_modules()]
    assert not any("gain" in name for name in baked.state_dict() if not name.startswith("skip"))
    assert all(module.training == training for module in baked.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {id(p) for p in baked.parameters()}.isdisjoint(id(p) for p in model.parameters())


def test_in_place() -> None:
    model = block()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert bake(model, inplace=True) is model
    assert not any(hasattr(module, "effective_weight") for module in model.modules())
    assert_same(model(x), expected)


def test_a_shared_layer_stays_shared() -> None:
    layer = randomized(ScaledStdConv2d(4, 4, 3, padding=1))
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.ReLU())})
    baked: Any = bake(model)
    assert baked["a"] is baked["b"][0]
    assert type(baked["a"]) is nn.Conv2d
    assert len(list(baked.parameters())) == 2


def test_hooks_types_and_frozenness_stay() -> None:
    model = nn.Sequential(randomized(ScaledStdConv2d(3, 4, 3)).double())
    model[0].weight.requires_grad_(False)
    seen = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre"), with_kwargs=True)
    baked: Any = bake(model)
    baked(torch.randn(1, 3, 5, 5, dtype=torch.float64))
    assert seen == ["pre", (1, 4, 3, 3)]
    assert baked[0].weight.dtype == torch.float64
    assert not baked[0].weight.requires_grad
    assert baked[0].bias.requires_grad


def test_parametrized_layers_bake() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    layer = randomized(ScaledStdConv2d(3, 4, 3))
    nn.utils.parametrize.register_parametrization(layer, "gain", Half())
    x = torch.randn(1, 3, 5, 5)
    baked = bake(layer)
    assert type(baked) is nn.Conv2d
    assert_same(baked(x), layer(x))


def test_a_model_without_such_layers_comes_back_as_a_copy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    baked = bake(model)
    assert baked is not model
    assert torch.equal(baked[0].weight, model[0].weight)  # type: ignore[index, union-attr]
    assert bake(model, inplace=True) is model
    with pytest.raises(UserError, match=r"expected a torch\.nn\.Module"):
        bake("resnet50")  # type: ignore[arg-type]


def hand_converted_resnet() -> nn.Module:
    """Torchvision's ResNet-18 with every convolution standardized and no BatchNorm, without the converter."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            twin = scaled_std_class(child)
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d) and twin is not None:
                setattr(module, name, twin.from_plain(child, scale=1.3, alpha=0.8))
    return model.eval()


def test_a_resnet_is_baked() -> None:
    model = hand_converted_resnet()
    baked = nfnets.bake(model)
    x = torch.randn(2, 3, 64, 64)
    assert_same(baked(x), model(x))
    types = [type(module) for module in baked.modules()]
    assert types.count(nn.Conv2d) == 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:copyreg")
@pytest.mark.parametrize("make", [block, hand_converted_resnet])
def test_a_baked_model_exports_and_onnxruntime_agrees(make: Any) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    baked = bake(make().eval())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = baked(x)
        exported = torch.export.export(baked, (x,))
        assert_same(exported.module()(x), expected)
        program = torch.onnx.export(exported, (x,), dynamo=True, verbose=False)
    assert program is not None
    stored = io.BytesIO()
    program.save(stored)
    operators = {node.op_type for node in program.model_proto.graph.node}
    assert "Conv" in operators
    assert not operators & {"BatchNormalization", "LayerNormalization", "InstanceNormalization"}
    session = onnxruntime.InferenceSession(stored.getvalue(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same(torch.from_numpy(np.asarray(answer)), expected)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).relu())


@pytest.mark.parametrize("method", list_methods())
def test_every_methods_model_is_baked(method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    converted = nfnets.convert(Residual(), x, method=method)
    for training in (True, False):
        baked = nfnets.bake(converted.train(training))
        assert_same(baked(x), converted(x))
        assert not any(isinstance(module, _ScaledStd) for module in baked.modules())


def test_nfnets_convert_can_be_called_whatever_was_imported_first() -> None:
    """Importing the package `nfnets.convert` puts it where the function `nfnets.convert` was."""
    model, x = torchvision.models.resnet18(num_classes=4), torch.randn(2, 3, 64, 64)
    for _ in range(2):
        converted = nfnets.convert(model, x, method="nf")
        baked = nfnets.bake(converted.eval())
        assert_same(baked(x), converted(x))
        assert [n for n, _ in baked.named_modules()] == [n for n, _ in converted.named_modules()]
