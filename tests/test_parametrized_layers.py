"""Layers whose weight is computed: what cannot be scaled keeps its weight, and a constant stands behind it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nfnets.convert import ConversionError, convert, list_methods, plan
from nfnets.layers import Scale

SPECTRAL = [
    partial(kind, n_power_iterations=30) for kind in (parametrizations.spectral_norm, nn.utils.spectral_norm)
]
ANY_NET = [name for name in list_methods() if name not in ("fixup", "skipinit")]


def images() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(wrap: Any, channels: int = 3) -> nn.Sequential:
    convolutions = [wrap(nn.Conv2d(c, 4, 3, padding=1, bias=False)) for c in (channels, 4)]
    return nn.Sequential(
        convolutions[0], nn.BatchNorm2d(4), nn.ReLU(), convolutions[1], nn.BatchNorm2d(4), nn.ReLU()
    )


@pytest.mark.parametrize("wrap", [*SPECTRAL, parametrizations.weight_norm])
@pytest.mark.parametrize("method", ANY_NET)
def test_they_are_converted(method: str, wrap: Any) -> None:
    torch.manual_seed(0)
    model, x = net(wrap), images()
    converted = convert(model, x, method=method)
    assert converted(x).isfinite().all()
    assert converted[0].bias is not None or method not in ("nf", "lsuv")


@pytest.mark.parametrize("wrap", SPECTRAL)
def test_lsuv_sets_a_constant_behind_a_weight_that_it_cannot_scale(wrap: Any) -> None:
    torch.manual_seed(0)
    model, x = net(wrap), images()
    assert [row.replaced for row in plan(model, x, method="lsuv")] == ["Scale", "Scale"]
    converted = convert(model, x, method="lsuv")
    assert isinstance(converted[1], Scale)
    for name, value in model.state_dict().items():
        if name.startswith(("0.", "3.")):
            assert torch.equal(converted.state_dict()[name], value), name
    with torch.no_grad():
        assert converted[:2](x).var((0, 2, 3)).mean().item() == pytest.approx(1, rel=0.01)


class Residual(nn.Module):
    def __init__(self, wrap: Any):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.branch = net(wrap, 4)[:-1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return x + self.branch(x)


@pytest.mark.parametrize("method", ["fixup", "skipinit"])
@pytest.mark.parametrize("wrap", SPECTRAL)
def test_what_draws_weights_refuses_them_in_the_plan(method: str, wrap: Any) -> None:
    model = Residual(wrap)
    rows = plan(model, images(), method=method)
    assert {row.action for row in rows} == {"refuse"}
    assert "branch.0" in rows.rows[0].reason
    with pytest.raises(ConversionError, match="strict=False leaves them"):
        convert(model, images(), method=method)
    left = convert(model, images(), method=method, strict=False)
    assert isinstance(left.norm, nn.BatchNorm2d)


def test_a_branch_that_ends_in_one_takes_a_scalar() -> None:
    class Ends(Residual):
        def __init__(self) -> None:
            super().__init__(lambda layer: layer)
            self.last = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return x + self.last(self.branch(x))

    model, x = Ends(), images()
    converted = convert(model, x, method="skipinit")
    assert torch.equal(converted(x), converted.norm(converted.stem(x)))
