from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

import nfnets
from nfnets.errors import UserError
from nfnets.train.loop.recompute import recompute_


class Blocks(nn.Module):
    """Residual blocks in a list, called with two arguments; BatchNorm, dropout and a tied layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.3)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x + scale * self.drop(self.norm(self.conv(x)).relu())


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 8), (8, 8), (8, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


MODELS: dict[str, Any] = {
    "list": (Blocks, ["blocks.0", "blocks.1", "blocks.2"]),
    "plain": (vgg, [""]),
    "timm resnet": (lambda: timm.create_model("resnet10t", num_classes=5, drop_path_rate=0.2), "layer1.0"),
    "timm nfnet": (lambda: timm.create_model("test_nfnet", num_classes=5), "stages.1"),
    "timm convnext": (lambda: timm.create_model("test_convnext", num_classes=5), "stages.1.blocks.0"),
    "ours": (lambda: nfnets.create_model("nf_resnet20_cifar", num_classes=5), "stages.0.1"),
    "torchvision densenet": (
        lambda: models.DenseNet(8, (2, 2), num_init_features=8, num_classes=5),
        "features.denseblock1.denselayer1",
    ),
    "torchvision mobilenet": (
        lambda: models.mobilenet_v3_small(num_classes=5, width_mult=0.5),
        "features.1",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_and_statistics(name: str):
    make, expected = MODELS[name]
    torch.manual_seed(0)
    plain = make()
    lean = copy.deepcopy(plain)
    found = recompute_(lean)
    assert (found == expected) if isinstance(expected, list) else (expected in found)
    assert lean.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(lean, type(plain))
    lean = copy.deepcopy(lean)  # as the moving average copies it
    images = torch.randn(3, 3, 32, 32)
    for step in range(2):
        outputs = []
        for model in (plain, lean):
            torch.manual_seed(step)
            outputs.append(model(images))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
    for (key, a), b in zip(plain.state_dict().items(), lean.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for (key, a), b in zip(plain.named_parameters(), lean.parameters(), strict=True):
        assert a.grad is not None, key
        assert b.grad is not None, key
        assert torch.equal(a.grad, b.grad), key
    plain.eval()
    lean.eval()
    assert torch.equal(plain(images), lean(images))


def kept_bytes(model: nn.Module) -> int:
    """What a forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            seen[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(8, 3, 32, 32))
    del output
    return sum(seen.values())


@pytest.mark.parametrize("name", ["list", "timm resnet", "torchvision mobilenet"])
def test_less_is_kept(name: str):
    torch.manual_seed(0)
    plain = MODELS[name][0]()
    lean = copy.deepcopy(plain)
    recompute_(lean)
    kept_bytes(lean)  # the first time, copies are made
    assert kept_bytes(lean) < 0.65 * kept_bytes(plain)


def test_nothing_to_recompute():
    with pytest.raises(UserError, match="grad_checkpointing: Linear has no blocks"):
        recompute_(nn.Linear(3, 3))


def test_a_failing_block_leaves_the_buffers():
    model = Blocks()
    recompute_(model)
    before = {name: id(buffer) for name, buffer in model.named_buffers()}
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == before
