"""An empty batch, models and calls under `torch.inference_mode`, complex layers: refused in one line, or right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nfnets
from nfnets.convert import bake, list_methods
from nfnets.errors import UserError
from nfnets.init import lsuv_
from nfnets.signal import profile

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


class Finds(nn.Module):
    """Images, and boxes of what is on them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        return self.body(images).sum() + boxes.sum()


@pytest.mark.parametrize("method", list_methods())
def test_an_empty_batch_is_refused(method: str) -> None:
    for convert in (nfnets.convert, nfnets.plan):
        with pytest.raises(UserError, match=r"input of shape \(0, 3, 8, 8\): expected at least one sample"):
            convert(net(), X[:0], method=method)
        with pytest.raises(UserError, match=r"input of shape \(0, 3, 8, 8\)"):
            convert(net(), method=method, kwargs={"input": X[:0]})


def test_an_empty_batch_is_refused_by_initializers() -> None:
    for initialize in (lsuv_, profile):
        with pytest.raises(UserError, match=r"input of shape \(16, 3, 0, 8\)"):
            initialize(net(), X[:, :, :0])


def test_images_that_show_nothing_are_a_batch() -> None:
    assert len(nfnets.plan(Finds(), X, torch.zeros(0, 4)).rows) == 1


def test_a_model_made_in_inference_mode_becomes_an_ordinary_one() -> None:
    with torch.inference_mode():
        model = net()
    for method in ("nf", "fold", "lsuv", "gn"):
        converted = nfnets.convert(model, X, method=method)
        converted(X).sum().backward()
        assert all(p.grad is not None for p in converted.parameters())
    assert model[0].weight.is_inference()
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda model: nfnets.convert(model, X, inplace=True),
        lambda model: lsuv_(model, X),
        lambda model: profile(model, X),
    ],
)
def test_what_cannot_be_changed_is_refused(call: Callable[[Any], Any]) -> None:
    with torch.inference_mode():
        model = net()
    with pytest.raises(UserError, match=r"0\.weight was made under torch\.inference_mode"):
        call(model)


def test_what_is_made_in_inference_mode_can_be_trained() -> None:
    model = net()
    with torch.inference_mode():
        converted = nfnets.convert(model, X + 0)
        baked = bake(converted)
        profile(model, X, backward=True)
    for made in (converted, baked):
        made(X).sum().backward()
        assert all(p.grad is not None for p in made.parameters())


class Complex(nn.Module):
    """A complex layer that feeds norm layers through what makes real numbers of it."""

    def __init__(self, real: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, dtype=torch.complex64)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.real = real

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.real(self.first(x.to(torch.complex64))))
        return self.block(y.relu()) + y


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("real", [torch.abs, torch.real, lambda z: torch.view_as_real(z).sum(-1)])
def test_complex_layers_are_left(real: Callable[[Tensor], Tensor], method: str) -> None:
    torch.manual_seed(0)
    model = Complex(real).eval()
    converted: Any = nfnets.convert(model, X, method=method)
    assert type(converted.first) is nn.Conv2d
    assert converted.first.weight.equal(model.first.weight)
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    assert converted(X).isfinite().all()
    if method == "fold":
        torch.testing.assert_close(converted(X), model(X), rtol=1e-4, atol=1e-4)


def test_initializers_leave_complex_layers() -> None:
    model = Complex(torch.abs)
    before = model.first.weight.detach().clone()
    assert [row.path for row in lsuv_(model, X)] == ["block.0"]
    assert model.first.weight.equal(before)
