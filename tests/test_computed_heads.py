"""Heads whose output need not follow their weight are scaled back to the BatchNorm model's as plain ones are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from nfnets import convert

SIGNALS = torch.randn(64, 1, 4, 60, generator=torch.Generator().manual_seed(0))


class MaxNorm(nn.Module):
    """As braindecode's constraint: rows no longer than this."""

    def __init__(self, most: float):
        super().__init__()
        self.most = most

    def forward(self, weight: Tensor) -> Tensor:
        return weight.renorm(2, 0, self.most)


class Renormalizing(nn.Linear):
    """Cuts its weight down whenever it is called."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(input)


class Renormalized(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.renorm(2, 0, 0.5), self.bias)


class FilterBank(nn.Module):
    """As FBCNet: spatial filters, normalization, then the log of the variance over time, and a head."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.filters, self.norm = nn.Conv2d(1, 16, (4, 1)), nn.BatchNorm2d(16)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.filters(x)))
        return self.head(x.var(3).clamp(1e-6, 1e6).log().flatten(1))


def parametrized(most: float) -> nn.Module:
    layer = nn.Linear(16, 4)
    parametrize.register_parametrization(layer, "weight", MaxNorm(most))
    return layer


HEADS: dict[str, Callable[[], Any]] = {
    "plain": lambda: nn.Linear(16, 4),
    "max-norm, as a parametrization": lambda: parametrized(0.5),
    "max-norm far below the weight": lambda: parametrized(0.01),
    "in place, in the forward": lambda: Renormalizing(16, 4),
    "in the forward": lambda: Renormalized(16, 4),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(16, 4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(16, 4)),
}


def net(head: str) -> Any:
    torch.manual_seed(0)
    model = FilterBank(HEADS[head]())
    with torch.no_grad():
        model(SIGNALS)  # layers that cut their weights have done so
        return model.train()


def rms(model: Any, x: Tensor = SIGNALS) -> float:
    with torch.no_grad():
        return float(copy.deepcopy(model).train()(x).square().mean().sqrt())


@pytest.mark.parametrize("method", ["nf", "lsuv", "fixed_variance"])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "spectral norm"])
def test_logits_stay_within_a_factor_two(name: str, method: str) -> None:
    model = net(name)
    converted = convert(model, SIGNALS, method=method)
    assert 0.5 < rms(converted) / rms(model) < 2
    assert type(converted.head) is type(model.head)
    with torch.enable_grad():
        converted(SIGNALS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in converted.head.parameters())


def test_what_takes_every_factor_back_stays_as_it_was() -> None:
    model = net("spectral norm")
    before = copy.deepcopy(model.head.state_dict())
    converted = convert(model, SIGNALS)
    for now, then in zip(converted.head.state_dict().values(), before.values(), strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_one_that_fits_is_left() -> None:
    model = net("max-norm, as a parametrization")
    before = model.head.parametrizations.weight.original.clone()
    calm = nn.Sequential(nn.Conv2d(1, 16, (4, 1)), nn.BatchNorm2d(16), nn.Flatten(), nn.LazyLinear(4))
    calm(SIGNALS)
    parametrize.register_parametrization(calm[3], "weight", MaxNorm(0.5))
    converted: Any = convert(calm, SIGNALS)
    own = calm[3].parametrizations.weight.original
    torch.testing.assert_close(converted[3].parametrizations.weight.original, own, rtol=0, atol=0)
    convert(model, SIGNALS)
    torch.testing.assert_close(model.head.parametrizations.weight.original, before, rtol=0, atol=0)
