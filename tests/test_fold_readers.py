"""`fold` keeps the function of models that read a layer's weight or output where no norm layer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets import verify
from nfnets.convert import ConversionError, convert, list_methods
from nfnets.layers import ChannelAffine, Scale


def randomized(model: nn.Module) -> nn.Module:
    """As after some training: statistics, γ and β of all kinds; for evaluation."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    return model.eval()


class Net(nn.Module):
    """A layer, its norm layer and one more, wired as `wire` says."""

    def __init__(self, wire: Callable[[Any, Tensor], Any]):
        super().__init__()
        self.c, self.bn, self.k = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.wire = wire

    def forward(self, x: Tensor) -> Any:
        return self.wire(self, x)


def tied(net: Net, x: Tensor) -> Tensor:
    return F.conv_transpose2d(net.bn(net.c(x)).relu(), net.c.weight.flip(-1), padding=1)


def read_by_a_function(net: Net, x: Tensor) -> Tensor:
    return net.k(net.bn(net.c(x))) + F.conv2d(x, net.c.weight, padding=1)


def regularized(net: Net, x: Tensor) -> Any:
    return net.k(net.bn(net.c(x))), net.c.weight.square().sum()


def its_bias_read(net: Net, x: Tensor) -> Any:
    return net.k(net.bn(net.c(x))) + net.c.bias.mean()


@pytest.mark.parametrize("wire", [tied, read_by_a_function, regularized, its_bias_read])
def test_a_weight_that_something_else_reads_is_not_folded(wire: Any) -> None:
    net, x = randomized(Net(wire)), torch.randn(4, 3, 8, 8)
    folded = convert(net, x, method="fold")
    assert isinstance(folded.bn, ChannelAffine)
    assert verify.same_function(net, folded, x)
    folded = convert(net.double(), x.double(), method="fold")
    assert verify.same_function(net, folded, x.double(), rtol=1e-10)


@pytest.mark.parametrize("method", ["nf", "ws_gn", "lsuv"])
def test_a_weight_that_something_else_reads_keeps_its_values(method: str) -> None:
    net, x = randomized(Net(tied)), torch.randn(4, 3, 8, 8)
    converted = convert(net, x, method=method)
    assert type(converted.c) is nn.Conv2d
    assert torch.equal(converted.c.weight, net.c.weight)
    assert method == "ws_gn" or isinstance(converted.bn, Scale)


def test_modules_that_share_a_weight_keep_sharing_it() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.b.weight = self.a.weight
            self.bns = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.bns[0](self.a(x)) + self.bns[1](self.b(x.flip(-1)))

    net, x = randomized(Twins()), torch.randn(4, 3, 8, 8)
    folded = convert(net, x, method="fold")
    assert folded.a.weight is folded.b.weight
    assert verify.same_function(net, folded, x)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.k(net.bn(net.c(x)))


def test_a_norm_layer_whose_parameters_are_read_elsewhere_is_refused() -> None:
    net = randomized(Net(lambda net, x: (plain(net, x), net.bn.weight.abs().sum())))
    with pytest.raises(ConversionError, match=r"reads bn\.weight"):
        convert(net, torch.randn(4, 3, 8, 8), method="fold")


@pytest.mark.parametrize("place", ["c", "bn"])
@pytest.mark.parametrize("before", [True, False])
def test_forward_hooks_stay_and_keep_their_effect(place: str, before: bool) -> None:
    net, x = randomized(Net(plain)), torch.randn(4, 3, 8, 8)
    module = net.get_submodule(place)
    if before:
        module.register_forward_pre_hook(lambda _, args: (3 * args[0] + 1,))
    else:
        module.register_forward_hook(lambda _, args, output: 3 * output + args[0])
    folded = convert(net, x, method="fold")
    assert verify.same_function(net, folded, x)
    assert not torch.allclose(net(x), plain_without_hooks(net, x), rtol=0.1)


def plain_without_hooks(net: Net, x: Tensor) -> Tensor:
    return net.k(net.bn.forward(net.c.forward(x)))


def test_hooks_behind_a_hooked_identity() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.BatchNorm2d(3)), torch.randn(4, 3, 8, 8)
    net[1].register_forward_hook(lambda _, args, output: output + 1)
    folded = convert(randomized(net), x, method="fold")
    assert verify.same_function(net, folded, x)


@pytest.mark.parametrize("method", list_methods())
def test_hooks_are_on_what_stands_in_their_place(method: str) -> None:
    net = randomized(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    body = nn.Sequential(nn.Conv2d(3, 3, 1), Around(net), nn.Conv2d(3, 3, 1))
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, _, __: seen.append(type(module).__name__))
        for module in net
    ]
    x = torch.randn(4, 3, 8, 8)
    converted = convert(body, x, method=method, inplace=True)
    seen.clear()
    converted(x)
    assert len(seen) == 2
    assert "BatchNorm2d" not in seen
    for handle in handles:
        handle.remove()
    converted(x)
    assert len(seen) == 2


class Around(nn.Module):
    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)
