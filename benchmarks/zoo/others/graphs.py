"""Graph nets: every sample is a graph of the same edges, so that a batch is one tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.others import library
from benchmarks.zoo.others.net import Called, Net

_NODES = 12


def _edges(graphs: int) -> Tensor:
    """A ring with chords, `graphs` times."""
    nodes = torch.arange(_NODES)
    pairs = torch.cat([torch.stack([nodes, (nodes + step) % _NODES]) for step in (1, 3, 5)], 1)
    pairs = torch.cat([pairs, pairs.flip(0)], 1)
    return torch.cat([pairs + _NODES * n for n in range(graphs)], 1)


def _on_nodes(net: nn.Module, x: Tensor) -> Tensor:
    """(graphs, nodes, features) in and out."""
    return net(x.flatten(0, 1), _edges(len(x))).unflatten(0, (len(x), _NODES))


def _alone(net: nn.Module, x: Tensor) -> Tensor:
    return net(x.flatten(0, 1)).unflatten(0, (len(x), _NODES))


def _with_batch(net: nn.Module, x: Tensor) -> Tensor:
    batch = torch.arange(len(x)).repeat_interleave(_NODES)
    return net(x.flatten(0, 1), _edges(len(x)), batch).unflatten(0, (len(x), _NODES))


class Layers(nn.Module):
    """A linear layer, then blocks one after another that are given the edges (and what graph a node is of)."""

    def __init__(self, first: nn.Module, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks = first, nn.ModuleList(blocks)

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        """The last block's nodes."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x, *edges)
        return x


@library
def torch_geometric() -> Iterator[Net]:
    """Basic nets with batch norm, residual ones, transformers and MLPs."""
    from torch_geometric import nn as gnn
    from torch_geometric.nn import models

    def net(name: str, build: Callable[[], nn.Module], call: Any = _on_nodes) -> Net:
        return Net(
            name, lambda: Called(build(), call), ((_NODES, 8),), "graph", family=name.partition("-")[0]
        )

    basic = {
        "in_channels": 8,
        "hidden_channels": 16,
        "num_layers": 3,
        "out_channels": 4,
        "norm": "batch_norm",
    }
    for name in ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN"):
        cls = getattr(models, name)
        yield net(name, functools.partial(cls, **basic))
        yield net(f"{name}-cat", functools.partial(cls, **basic, jk="cat"))
        yield net(f"{name}-deep", functools.partial(cls, **basic | {"num_layers": 8}, dropout=0.2))
    degrees = {
        "aggregators": ["mean", "max", "std"],
        "scalers": ["identity"],
        "deg": torch.bincount(torch.full((9,), 6)),
    }
    yield net("PNA", functools.partial(models.PNA, **basic, **degrees))
    yield net("GAT-v2", functools.partial(models.GAT, **basic, v2=True, heads=2))
    for block in ("res+", "res", "dense", "plain"):
        yield net(f"DeepGCN-{block}", functools.partial(_deep, models, gnn, block))
    yield net("MLP", lambda: models.MLP([8, 32, 32, 4]), _alone)
    yield net("MLP-deep", lambda: models.MLP([8] + [32] * 8 + [4], dropout=0.3), _alone)
    yield net("PMLP", lambda: models.PMLP(8, 16, 4, 4))
    yield net("SGFormer", lambda: models.SGFormer(8, 16, 4), _with_batch)
    yield net("Polynormer", lambda: models.Polynormer(8, 16, 4, local_layers=2, global_layers=1), _with_batch)
    block = lambda: gnn.GPSConv(16, gnn.SAGEConv(16, 16), heads=2, norm="batch_norm")  # noqa: E731
    yield net("GPS", lambda: Layers(nn.Linear(8, 16), block(), block()), _with_batch)


def _deep(models: Any, gnn: Any, block: str) -> nn.Module:
    widths = [16, 32, 48] if block == "dense" else [16, 16, 16]
    layers = [
        models.DeepGCNLayer(
            gnn.SAGEConv(width, 16), nn.BatchNorm1d(width if block in ("res+",) else 16), nn.ReLU(), block
        )
        for width in widths
    ]
    return Layers(nn.Linear(8, 16), *layers)
