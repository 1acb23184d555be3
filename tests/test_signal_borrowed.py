"""Moments that a BatchNorm lends, and tensors that wait for it, are those that a read right after the call gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import nfnets

borrowed = import_module("nfnets.signal.borrowed")
SEEN: list[Tensor] = []
"""What the convolution of the last forward pass put out; no attribute of the net, which a profile would put back."""


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Small tensors wait as large ones do; yields what was lent."""
    lent: list[object] = []
    found = borrowed._Statistics.of

    def of(statistics: object, x: Tensor) -> object:
        lent.append(found(statistics, x))
        return lent[-1]

    monkeypatch.setattr(borrowed, "_WORTH", 0)
    monkeypatch.setattr(borrowed._Statistics, "of", of)
    yield lent
    SEEN.clear()


class _Net(nn.Module):
    """A convolution, and what is done with its output next."""

    def __init__(self, then: Callable[[Tensor, nn.Module], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.then = nn.Conv2d(3, 6, 3), norm or nn.BatchNorm2d(6), then

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch._C.DisableTorchFunction():  # a copy that no recorder sees
            SEEN.append(y.detach().clone())
        return self.then(y, self.norm)


class _WritesUnseen(nn.Module):
    """As modules of other libraries do whose kernels torch knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            x.data.mul_(100.0)
        return x


class _OnlyShifts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1.0


class _Through(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, y: Tensor, norm: nn.Module) -> Tensor:
        return norm(self.layer(y))


AFTERWARDS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "norm": lambda y, norm: norm(y),
    "norm, then in place": lambda y, norm: norm(y) + y.data.mul_(50.0),
    "in place before the norm": lambda y, norm: norm(y.mul_(50.0)),
    "in place through an alias": lambda y, norm: norm(y.data.mul_(50.0)),
    "in place in a list": lambda y, norm: norm((torch._foreach_mul_([y], 50.0), y)[1]),
    "in-place activation": lambda y, norm: norm(torch.relu_(y)),
    "a module that writes unseen": _Through(_WritesUnseen()),
    "another module": _Through(_OnlyShifts()),
    "nothing": lambda y, norm: y,
    "norm on a slice": lambda y, norm: norm(y[:2]),
    "functional norm": lambda y, norm: nn.functional.batch_norm(y, None, None, training=True),
}


def check(net: nn.Module, x: Tensor, rel: float = 1e-5) -> None:
    for report in (nfnets.profile(net, x), probed(net, x)):
        assert_point(report["conv"], SEEN[-1], rel)


def probed(net: nn.Module, x: Tensor) -> nfnets.SignalReport:
    with nfnets.probe(net, backward=True) as p:
        for _ in range(2):
            net(x.clone()).sum().backward()
    return p.report()


def assert_point(got: nfnets.signal.Point, y: Tensor, rel: float) -> None:
    var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert got.var == pytest.approx(var.mean().item(), rel=rel)
    assert got.mean_sq == pytest.approx(mean.square().mean().item(), rel=rel)
    assert (got.min, got.max) == (y.min().item(), y.max().item())
    assert got.dead == (var < 1e-12).double().mean().item()


@pytest.mark.filterwarnings("ignore::nfnets.signal.SignalWarning")
@pytest.mark.parametrize("name", AFTERWARDS)
def test_what_waits_is_measured_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    net = _Net(AFTERWARDS[name])
    check(net, torch.randn(4, 3, 12, 12))


def test_a_batch_norm_lends(at_any_size: list[object]) -> None:
    torch.manual_seed(0)
    check(_Net(lambda y, norm: norm(y)), torch.randn(4, 3, 12, 12))
    assert at_any_size
    assert None not in at_any_size


@pytest.mark.filterwarnings("ignore::nfnets.signal.SignalWarning")
@pytest.mark.parametrize(
    ("norm", "scale"),
    [
        (nn.BatchNorm2d(6).eval(), 1.0),  # running statistics: a profile uses the batch's, a probe does not
        (nn.BatchNorm2d(6, affine=False), 1.0),
        (nn.BatchNorm2d(6, track_running_stats=False).eval(), 1.0),
        (nn.BatchNorm2d(6, eps=1.0), 1e-3),  # a variance far below eps, of which 1/√(var + eps) tells nothing
        (nn.BatchNorm2d(6), 1e-4),
        (nn.BatchNorm2d(6), 1e6),
    ],
)
def test_whatever_the_norm(norm: nn.Module, scale: float) -> None:
    torch.manual_seed(0)
    net = _Net(lambda y, norm: norm(y), norm)
    with torch.no_grad():
        net.conv.weight.mul_(scale)
        net.conv.weight[3] = 0  # constant
    check(net, torch.randn(4, 3, 12, 12))


def test_in_double_precision() -> None:
    torch.manual_seed(0)
    check(_Net(lambda y, norm: norm(y)).double(), torch.randn(4, 3, 12, 12, dtype=torch.float64))


def test_the_pass_stays_bit_for_bit() -> None:
    torch.manual_seed(0)
    net, x = _Net(lambda y, norm: norm(y).relu_()), torch.randn(4, 3, 12, 12)
    out = net(x)
    out.sum().backward()
    before = [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
    net.zero_grad()
    with nfnets.probe(net):
        out = net(x)
        out.sum().backward()
    after = [out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "shape", [(2, 5), (70, 5), (3, 5, 4, 4), (9, 700, 3, 3), (4, 5, 63), (4, 5, 64), (5, 3, 2, 2, 2)]
)
@pytest.mark.parametrize("form", ["contiguous", "channels last", "strided"])
def test_extremes_and_moments_of_short_and_long_maps(shape: tuple[int, ...], form: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.arange(1.0, shape[1] + 1).view(1, -1, *[1] * (len(shape) - 2)) + 5
    if form == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif form == "strided":
        x = torch.stack((x, x), -1)[..., 0]
    scan = import_module("nfnets.signal.moments").scan
    var, mean = torch.var_mean(x.double().movedim(1, 0).flatten(1), 1, correction=0)
    for channelwise in (False, True):
        moments, low, high = scan(x, 1, True, channelwise)
        torch.testing.assert_close(moments.var.double(), var, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-5, atol=1e-4)
        assert (low.min().item(), high.max().item()) == (x.min().item(), x.max().item())
        if low.dim():  # of long maps alone
            assert torch.equal(low, x.movedim(1, 0).flatten(1).amin(1))
    none, low, high = scan(x, 1, True, True, moments=False)
    assert none is None
    assert (low.min().item(), high.max().item()) == (x.min().item(), x.max().item())
