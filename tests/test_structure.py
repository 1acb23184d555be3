"""Walks over graphs against what brute force finds, and the words that docs/design.md defines."""

from __future__ import annotations

import random

import pytest
import timm
import torch
import torchvision
from conversion_nets import NETS
from coverage_nets import SMALL
from torch import nn

from nfnets.graph import Graph, Node
from nfnets.structure.norms import norm_kind, norm_layers
from nfnets.structure.readers import heads, overwritten
from nfnets.structure.sites import find_sites
from nfnets.structure.walk import is_weighted, walk
from nfnets.trace import trace
from nfnets.whose import runs_torchs_code


def random_graph(seed: int) -> Graph:
    draw = random.Random(seed)
    nodes = []
    for index in range(30):
        inputs = tuple(sorted(draw.sample(range(index), min(index, draw.randint(0, 3)))))
        nodes.append(
            Node(index, "function", draw.choice(["add", "relu"]), "", inputs, (), (2,), torch.float32)
        )
    return Graph(nodes, (29,))


@pytest.mark.parametrize("seed", range(10))
def test_a_walk_back_reaches_the_ancestors(seed: int) -> None:
    graph = random_graph(seed)
    for index in range(len(graph)):
        assert set(walk(graph, [index], lambda node: node.inputs)) == graph.ancestors(index) | {index}


@pytest.mark.parametrize("seed", range(10))
def test_a_walk_stops_behind_or_before_a_node(seed: int) -> None:
    graph = random_graph(seed)
    behind = walk(graph, [29], lambda node: () if node.name == "relu" else node.inputs)
    before = walk(graph, [29], lambda node: None if node.name == "relu" else node.inputs)
    assert set(before) == {i for i in behind if graph.nodes[i].name != "relu"}
    for index in behind:  # each is reached through nodes at which the walk does not stop
        readers = [i for i in graph.consumers(index) if i in behind and graph.nodes[i].name != "relu"]
        assert index == 29 or readers


def test_norm_layers_by_kind() -> None:
    net = nn.Sequential(
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        torchvision.ops.FrozenBatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.LayerNorm(4),
        timm.layers.LayerNorm2d(4),
        nn.RMSNorm(4),
        nn.ReLU(),
    )
    kinds = [norm_kind(layer) for layer in net]
    assert kinds == ["batch"] * 3 + ["group", "instance", "layer", "layer", "rms", None]
    assert list(norm_layers(net)) == ["0", "1", "2"]
    assert list(norm_layers(net, ("layer", "rms"))) == ["5", "6", "7"]


def test_sites_of_another_kind_are_found_where_they_are_asked_for() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    graph = trace(net, torch.randn(2, 3, 8, 8))
    assert [site.path for site in find_sites(net, graph)] == ["4"]
    found = find_sites(net, graph, ("group", "batch"))
    assert [(site.path, site.kind, site.feeder.path) for site in found] == [
        ("1", "group", "0"),
        ("4", "batch", "3"),
    ]


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet18", ["fc"]), ("vgg", ["16"]), ("mobile", ["7"]), ("features", ["7"])]
)
def test_the_head_is_what_no_layer_follows(name: str, expected: list[str]) -> None:
    graph = trace(NETS[name](), torch.randn(2, 3, 32, 32))
    found = heads(graph, lambda node: is_weighted(node.module), lambda node: False)
    assert [node.path for node in found] == expected


def test_two_heads() -> None:
    case = SMALL["auxiliary"]
    net = case.build().train()
    graph = trace(net, *case.inputs())
    found = heads(graph, lambda node: is_weighted(node.module), lambda node: False)
    assert {node.path for node in found} == {"head", "aux.3"}


def test_what_an_operation_in_place_writes_over() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.Tanh()
    )
    graph = trace(net, torch.randn(1, 3, 8, 8))
    calls = {node.path: node.index for node in graph.nodes if node.kind == "module"}
    assert overwritten(graph, calls["0"])
    assert not overwritten(graph, calls["3"])


def test_whose_code_runs() -> None:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    class Padded(nn.Conv2d):
        def _conv_forward(self, *args: object) -> torch.Tensor:
            return super()._conv_forward(*args)  # type: ignore[arg-type]

    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    theirs = [
        nn.Linear(2, 2),
        nn.Conv3d(2, 2, 1),
        nn.BatchNorm1d(2),
        nn.MultiheadAttention(4, 2),
        nn.LazyLinear(2),
    ]
    assert all(map(runs_torchs_code, theirs))
    assert not any(map(runs_torchs_code, [Own(2, 2), Padded(2, 2, 1), patched]))
