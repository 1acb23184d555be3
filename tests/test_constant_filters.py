"""Filters that standardization would destroy, and frozen ones, stay plain with a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfnets import convert, plan
from nfnets.layers import Scale, _ScaledStd

IMAGES = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def filled(layer: Any, *weights: float) -> Any:
    """A layer whose filters all hold these weights, over their first dimension."""
    layer.weight.data[:] = torch.tensor(weights).reshape(1, -1, *[1] * (layer.weight.ndim - 2))
    return layer


def bank() -> Any:
    """One box among drawn filters."""
    layer = nn.Conv2d(3, 4, 3, bias=False)
    layer.weight.data[1] = 1 / 27
    return layer


def upsampling() -> Any:
    """A transposed convolution with a box for one of its outputs, which its second dimension holds."""
    layer = nn.ConvTranspose2d(3, 4, 3, bias=False)
    layer.weight.data[:, 2] = 0.1
    return layer


FILTERS: dict[str, Callable[[], Any]] = {
    "mean over channels": lambda: filled(nn.Conv2d(3, 1, 1, bias=False), 1 / 3),
    "box": lambda: filled(nn.Conv2d(3, 2, 5, bias=False), 1 / 75),
    "frozen luma": lambda: filled(nn.Conv2d(3, 1, 1, bias=False), 0.299, 0.587, 0.114).requires_grad_(False),
    "bank": bank,
    "upsampling": upsampling,
    "grouped": lambda: filled(nn.Conv2d(3, 6, 3, groups=3, bias=False), 1 / 9),
}


def around(layer: Any) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(layer.out_channels)
    rest = (nn.Conv2d(layer.out_channels, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(
        layer, norm, nn.ReLU(), *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def correlation(one: Tensor, other: Tensor) -> float:
    pair = torch.stack([one.flatten(), other.flatten()]).detach()
    return float(torch.corrcoef(pair)[0, 1])


@pytest.mark.parametrize("method", ["nf", "ws_gn"])
@pytest.mark.parametrize("name", FILTERS)
def test_every_channel_still_shows_the_filtered_image(name: str, method: str) -> None:
    layer = FILTERS[name]()
    seen = layer(IMAGES)
    converted = convert(around(layer), IMAGES, method=method)
    assert not isinstance(converted[0], _ScaledStd)
    put_out = converted[1](converted[0](IMAGES))
    if method == "nf":  # a constant keeps what the filter computes, whatever its groups
        for channel in range(seen.shape[1]):
            assert correlation(put_out[:, channel], seen[:, channel]) > 0.999
    assert bool((put_out.std((0, 2, 3)) > 0.1).all())
    assert 0 < float(put_out.square().mean()) <= 4.01


def test_the_scale_is_measured_and_the_shift_learns_even_behind_a_frozen_filter() -> None:
    centred = IMAGES - IMAGES.mean((0, 2, 3), keepdim=True)
    layer = FILTERS["frozen luma"]()
    model = around(layer)
    converted = convert(model, centred)
    put_out = converted[1](converted[0](centred))
    assert float(put_out.var()) == pytest.approx(1, rel=0.01)
    assert isinstance(converted[1], Scale)
    torch.testing.assert_close(converted[0].weight, model[0].weight)
    assert not converted[0].weight.requires_grad
    assert converted[0].bias.requires_grad  # β did


def test_all_frozen_layers_keep_what_they_compute() -> None:
    """Sobel's filters have no mean to lose, but norms that standardization would change one against the other."""
    sobel = torch.tensor([[[[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]]])
    layer = nn.Conv2d(1, 2, 3, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.cat([sobel, 3 * sobel]))
    norm = nn.BatchNorm2d(2).requires_grad_(False)
    converted = convert(nn.Sequential(layer, norm), IMAGES[:, :1])
    scale = converted[1].value
    torch.testing.assert_close(converted(IMAGES[:, :1]), scale * layer(IMAGES[:, :1]))
    assert float(scale) > 0
    assert not any(parameter.requires_grad for parameter in converted.parameters())


def test_lsuv_puts_a_constant_behind_a_frozen_filter() -> None:
    layer = filled(nn.Conv2d(3, 1, 1, bias=False), 0.003, 0.006, 0.001).requires_grad_(False)
    centred = IMAGES - IMAGES.mean((0, 2, 3), keepdim=True)
    converted = convert(around(layer), centred, method="lsuv")
    assert float(converted[1](converted[0](centred)).var()) == pytest.approx(1, rel=0.01)


def test_linear_layers_and_the_plan_say_why() -> None:
    mean = filled(nn.Linear(6, 2, bias=False), 1 / 6)
    model = nn.Sequential(mean, nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 3))
    (row,) = plan(model, torch.randn(32, 6))
    assert "a filter of equal weights" in row.reason
    (frozen,) = plan(model.requires_grad_(False), torch.randn(32, 6))
    assert "frozen" in frozen.reason


def test_weights_that_are_drawn_or_zero_are_standardized_as_before() -> None:
    for fill in (nn.init.kaiming_normal_, nn.init.zeros_, lambda w: nn.init.normal_(w, 1.0, 0.1)):
        layer = nn.Conv2d(3, 4, 3, bias=False)
        fill(layer.weight)
        assert isinstance(convert(around(layer), IMAGES)[0], _ScaledStd)


def test_a_parametrized_constant_filter_stays_plain_too() -> None:
    layer = filled(nn.Conv2d(3, 1, 1, bias=False), 1 / 3)
    nn.utils.parametrizations.weight_norm(layer)
    converted = convert(around(layer), IMAGES)
    assert correlation(converted[1](converted[0](IMAGES)), layer(IMAGES)) > 0.999


def test_a_filter_that_a_norm_layer_reads_through_a_sum_stays_plain() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box = filled(nn.Conv2d(3, 4, 3, padding=1, bias=False), 1 / 27)
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.box(x) + self.conv(x))

    converted: Any = convert(Net(), IMAGES)
    torch.testing.assert_close(converted.box.weight, Net().box.weight)
    assert type(converted.box) is nn.Conv2d
    assert isinstance(converted.conv, _ScaledStd)


def test_a_filter_is_told_by_all_of_its_weights() -> None:
    """Not by the few that are looked at first; against `var_mean` of every filter."""
    generator = torch.Generator().manual_seed(0)
    for spread in (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2):
        for weights in (5, 6):
            layer = nn.Linear(weights, 3, bias=False)
            layer.weight.data[:] = 0.5 + spread * torch.randn(3, weights, generator=generator)
            layer.weight.data[1] = torch.randn(weights, generator=generator)
            layer.weight.data[1, [0, weights // 2, -1]] = 0.5  # what is looked at first is alike
            var, mean = torch.var_mean(layer.weight.double(), 1, correction=0)
            lost = bool(((weights * var < 1e-6) & (var < 1e-4 * mean.square())).any())
            model = nn.Sequential(layer, nn.BatchNorm1d(3))
            (row,) = plan(model, torch.randn(32, weights, generator=generator))
            assert ("a filter of equal weights" in row.reason) == lost
