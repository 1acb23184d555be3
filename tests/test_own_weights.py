"""Layers that standardize their own weight, half precision that overflows, and refusals that name the user's call."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import StdConv2d  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn import functional as F

from nfnets import convert, plan
from nfnets.errors import UserError
from nfnets.init import fixup_, skipinit_
from nfnets.layers import ChannelAffine, Scale, ScaledStdConv2d

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Standardizing(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Squashing(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class Equalized(nn.Conv2d):
    """Follows its weight, times a constant."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight * 0.3, self.bias)


@pytest.mark.parametrize(
    ("layer", "stands"),
    [
        (partial(Standardizing, 3, 8, 3), Scale),
        (partial(Standardizing, 3, 8, 3, bias=False), Scale),
        (partial(StdConv2d, 3, 8, 3), Scale),
        (partial(Squashing, 3, 8, 3), Scale),
        (partial(Equalized, 3, 8, 3), nn.Identity),
        (partial(nn.Conv2d, 3, 8, 3), nn.Identity),
    ],
)
def test_lsuv_puts_a_constant_where_a_weight_sets_no_size(
    layer: Callable[[], nn.Module], stands: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    assert plan(model, X, method="lsuv").summary().endswith("1 to replace")
    converted = convert(model, X, method="lsuv")
    assert type(converted[1]) is stands  # type: ignore[index]
    assert converted[:2](X).std().item() == pytest.approx(1, rel=0.03)  # type: ignore[index]


class Two(Squashing):
    """Looks at two tensors, so that it can be judged in the pass alone."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input + other)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = Two(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x, x))


def test_what_lsuv_cannot_scale_is_told_in_the_words_of_convert() -> None:
    model = Both()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r'layer cannot be scaled: .*exclude=.*method="nf"') as caught:
        convert(model, X, method="lsuv", inplace=True)
    assert "strict" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Residual(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


@pytest.mark.parametrize("method", ["fixup", "skipinit"])
def test_refusals_name_method_and_function(method: str) -> None:
    straight = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    function: Any = {"fixup": fixup_, "skipinit": skipinit_}[method]
    told = r"use LSUV .*\(the method lsuv, or nfnets\.init\.lsuv_\)"
    assert re.search(told, plan(straight, X, method=method).refused[0].reason)
    with pytest.raises(UserError, match=told):
        function(nn.Sequential(nn.Conv2d(3, 8, 3)), X)
    with pytest.raises(UserError, match=r"use the method nf, or LSUV"):
        fixup_(Residual(ScaledStdConv2d(3, 3, 3, padding=1)), X)


def _half(weight: float, variance: float, gamma: float = 1.0) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2, eps=1e-7)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(weight)
        model[1].float().running_var.fill_(variance)  # type: ignore[union-attr]
        model[1].weight.fill_(gamma)
        model[1].half()
    return model


def test_a_fold_that_overflows_half_precision_stays_an_affine() -> None:
    x = torch.full((2, 3, 4, 4), 1e-3).half()
    model = _half(weight=300.0, variance=0.0)  # 300 / √1e-7 is 950,000, and 65,504 the largest number
    expected = F.conv2d(x.double(), model[0].weight.double()) * 1e-7**-0.5
    rows = plan(model, x, method="fold").rows
    assert (rows[0].replaced, rows[0].reason) == (
        "ChannelAffine",
        "folded into 0 it would overflow torch.float16",
    )
    folded = convert(model, x, method="fold")
    assert isinstance(folded[1], ChannelAffine)  # type: ignore[index]
    torch.testing.assert_close(folded(x).double(), expected, rtol=1e-2, atol=0)
    assert isinstance(convert(_half(1.0, 0.0), x, method="fold")[1], nn.Identity)  # type: ignore[index]


def test_an_affine_that_overflows_half_precision_is_refused() -> None:
    x = torch.full((2, 3, 4, 4), 1e-3).half()
    model = _half(weight=1.0, variance=0.0, gamma=100.0)
    with pytest.raises(UserError, match=r"its affine map overflows torch.float16; fold the model in float32"):
        convert(model, x, method="fold")
    assert isinstance(convert(model.float(), x.float(), method="fold")[1], nn.Identity)  # type: ignore[index]
