"""Statistics that are derived instead of read must be those that a read would give."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nfnets

SEEN: dict[str, Tensor] = {}
"""What the last forward pass put out; no attribute of the net, which a profile would put back."""


class _Net(nn.Module):
    """Convolution, norm, activation; what the last two really return is kept."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), norm, activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        SEEN["norm"] = x.detach().clone()
        x = self.act(x)
        SEEN["act"] = x.detach().clone()
        return x


def _norm(**options: object) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(8, **options)  # type: ignore[arg-type]
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-2, 2, 8))
            norm.bias.copy_(torch.linspace(1, -3, 8))
    return norm


def _halved(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return output * 0.5


def _shifted(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 3 - 1,)


def _hooked(module: nn.Module, before: bool) -> nn.Module:
    module.register_forward_pre_hook(_shifted) if before else module.register_forward_hook(_halved)  # type: ignore
    return module


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: _Net(_norm(), nn.ReLU()),
    "in place": lambda: _Net(_norm(), nn.ReLU(inplace=True)),
    "no affine": lambda: _Net(_norm(affine=False), nn.ReLU()),
    "no running statistics": lambda: _Net(_norm(track_running_stats=False).eval(), nn.ReLU()),
    "large eps": lambda: _Net(_norm(eps=3.0), nn.ReLU()),
    "another's hook on the output": lambda: _Net(_hooked(_norm(), False), _hooked(nn.ReLU(), False)),
    "another's hook on the input": lambda: _Net(_hooked(_norm(), True), _hooked(nn.ReLU(), True)),
    "double": lambda: _Net(_norm(), nn.ReLU()).double(),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("constant", [False, True])
def test_derived_statistics_are_the_measured_ones(name: str, constant: bool) -> None:
    torch.manual_seed(0)
    net = NETS[name]()
    assert isinstance(net, _Net)
    if constant:
        with torch.no_grad():
            net.conv.weight[3] = 0  # a channel that does not vary: BatchNorm divides by sqrt(eps)
    x = torch.randn(4, 3, 12, 12, dtype=net.conv.weight.dtype)
    report = nfnets.profile(net, x)
    for point in ("norm", "act"):
        y = SEEN[point]
        var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        got = report[point]
        assert got.var == pytest.approx(var.mean().item(), rel=1e-5)
        assert got.mean_sq == pytest.approx(mean.square().mean().item(), rel=1e-5, abs=1e-9)
        # To a unit in the last place: how torch's kernels round depends on the processor.
        assert got.min == pytest.approx(y.min().item(), rel=3e-7, abs=1e-9)
        assert got.max == pytest.approx(y.max().item(), rel=3e-7, abs=1e-9)
        assert got.dead == (var < 1e-12).double().mean().item()


def test_what_is_not_finite_stays_so() -> None:
    net = _Net(_norm(), nn.ReLU())
    with torch.no_grad():
        net.conv.bias[2] = math.nan  # type: ignore[index]
    report = nfnets.profile(net, torch.randn(4, 3, 12, 12))
    for name in ("conv", "norm", "act"):
        assert report[name].nonfinite, name
        assert math.isnan(report[name].var or 0.0), name


def test_a_frozen_norm_layer_is_measured() -> None:
    torch.manual_seed(0)
    net = _Net(_norm(), nn.ReLU()).train()
    net.norm.eval()
    report = nfnets.profile(net, torch.randn(4, 3, 12, 12))
    var, mean = torch.var_mean(SEEN["norm"].double(), (0, 2, 3), correction=0)
    assert report["norm"].var == pytest.approx(var.mean().item(), rel=1e-5)
    assert report["norm"].mean_sq == pytest.approx(mean.square().mean().item(), rel=1e-5)
