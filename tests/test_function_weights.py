"""Where weights are no layer of torch's, a constant and a centred bias stand for a norm layer that reads them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets import convert, plan
from nfnets.convert.methods.fixed_variance import FixedVariance
from nfnets.layers import Scale

NODES = torch.rand(256, 5, generator=torch.Generator().manual_seed(0))
EDGES = torch.randint(256, (2, 1500), generator=torch.Generator().manual_seed(1))


class Dense(nn.Module):
    """A linear layer of a library's own, as graph nets have."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Product(Dense):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def summed(x: Tensor, edges: Tensor) -> Tensor:
    """What a node's neighbours hold."""
    return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])


class Convolution(nn.Module):
    """GIN's (`isomorphism`), GraphSAGE's (two linears, added) or GCN's (the linear first, the bias last)."""

    def __init__(self, kind: str, linear: Any, inputs: int, outputs: int):
        super().__init__()
        self.kind, self.one = kind, linear(inputs, outputs)
        self.other = linear(inputs, outputs)
        self.shift = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        if self.kind == "isomorphism":
            return self.one(x + summed(x, edges))
        if self.kind == "sage":
            return self.one(x) + self.other(summed(x, edges))
        return summed(self.one(x), edges) + self.shift


class GraphNet(nn.Module):
    def __init__(self, kind: str, linear: Any = Dense):
        super().__init__()
        sizes = (5, 16, 16, 16)
        self.convs = nn.ModuleList(Convolution(kind, linear, a, b) for a, b in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in self.convs)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x, edges)).relu()
        return self.head(x)


def seen_behind(model: Any, *inputs: Tensor) -> list[Tensor]:
    """What the layers in the norm layers' places put out."""
    found: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _i, out: found.append(out)) for m in model.norms]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("kind", "linear"), [("isomorphism", Dense), ("sage", Dense), ("gcn", Dense), ("gcn", Product)]
)
def test_every_channel_has_mean_zero_as_with_batch_norm(kind: str, linear: Any) -> None:
    torch.manual_seed(0)
    model = GraphNet(kind, linear)
    converted: Any = convert(model, NODES, EDGES)
    for output in seen_behind(converted, NODES, EDGES):
        torch.testing.assert_close(output.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
        assert float(output.var(0, correction=0).mean()) == pytest.approx(1, rel=1e-3)
    assert all(isinstance(norm, FixedVariance) and norm.bias.requires_grad for norm in converted.norms)
    for conv, old in zip(converted.convs, model.convs, strict=True):
        torch.testing.assert_close(conv.state_dict(), old.state_dict())


def test_of_few_samples_no_mean_is_taken_away_but_a_shift_learns() -> None:
    torch.manual_seed(0)
    few = torch.rand(16, 5)
    converted: Any = convert(GraphNet("isomorphism"), few, EDGES % 16)
    for norm, output in zip(converted.norms, seen_behind(converted, few, EDGES % 16), strict=True):
        assert not norm.bias.any()
        assert norm.bias.requires_grad
        assert float(output.square().mean().sqrt()) <= 2.001


def test_a_frozen_shift_stays_frozen() -> None:
    model = GraphNet("gcn")
    model.norms.requires_grad_(False)
    converted: Any = convert(model, NODES, EDGES)
    assert not any(norm.bias.requires_grad for norm in converted.norms)


def test_behind_torchs_own_layers_nothing_changes() -> None:
    """A pre-activation net's norm layers read sums of convolutions: a constant stands there, as ever."""

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
            self.last = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.conv(self.norm(x).relu())
            return self.last(x + F.conv2d(x, self.weight))

    rows = plan(PreActivation(), torch.randn(32, 3, 8, 8))
    assert [row.replaced for row in rows] == [Scale.__name__] * 2
