"""Models that keep what they computed can be copied: for `convert`, `bake` and everything else that copies."""

from __future__ import annotations

import collections
import functools

import pytest
import torch
from torch import Tensor, nn

import nfnets
from nfnets.convert import bake
from nfnets.copying import deep_copy


class Caching(nn.Module):
    """Keeps an activation, as LeViT its attention biases and dynamic U-Nets their skips."""

    def __init__(self, keep) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        self.keep(self, y)
        return y.relu()


def as_attribute(model: nn.Module, y: Tensor) -> None:
    model.seen = y


def in_containers(model: nn.Module, y: Tensor) -> None:
    model.seen = collections.deque([{"skips": [y, y]}, functools.partial(torch.add, y)])


def on_an_object(model: nn.Module, y: Tensor) -> None:
    model.seen = type("Store", (), {})()
    model.seen.activation = y


@pytest.mark.parametrize("keep", [as_attribute, in_containers, on_an_object])
@pytest.mark.parametrize("used", [nfnets.convert, bake])
def test_a_model_that_keeps_an_activation_is_copied(keep, used):
    model = Caching(keep)
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    inputs = (x,) if used is nfnets.convert else ()
    copied = used(model, *inputs)
    assert copied is not model
    assert copied.conv.weight is not model.conv.weight
    if used is bake:
        assert copied(x).equal(expected)


def test_values_are_kept_without_history_and_shared_as_before():
    layer = nn.Linear(3, 2)
    layer.first = layer(torch.randn(4, 3))
    layer.again = [layer.first]
    twin = deep_copy(layer)
    assert twin.first.equal(layer.first)
    assert twin.first is twin.again[0]
    assert not twin.first.requires_grad
    twin.first.add_(1)
    assert not twin.first.equal(layer.first)
    assert layer.first.grad_fn is not None


def test_a_view_of_a_parameter_stays_one():
    layer = nn.Linear(3, 2)
    layer.tied = layer.weight.t()[1:]
    twin = deep_copy(layer)
    with torch.no_grad():
        twin.weight.copy_(torch.arange(6.0).view(2, 3))
    assert twin.tied.tolist() == [[1.0, 4.0], [2.0, 5.0]]
    twin.tied.sum().backward()
    assert twin.weight.grad.tolist() == [[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    assert layer.weight.grad is None


def test_the_old_weight_norm_is_copied():
    with pytest.warns(FutureWarning, match="deprecated"):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(conv, nn.BatchNorm2d(4))
    x = torch.randn(4, 3, 8, 8)
    copied = nfnets.convert(model.eval(), x, method="fold").eval()
    assert torch.allclose(copied(x), model(x), atol=1e-5)
