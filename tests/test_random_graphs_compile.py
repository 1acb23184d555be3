"""Converted random networks in PyTorch's compiler and exporter; few of them, for every one takes seconds."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_graphs import Net, build, inputs, leaves, nets
from test_random_graphs import GRAPHS, close, converted, methods, run
from torch import nn

from nfnets.convert import bake

FEW = settings(GRAPHS, max_examples=max(2, GRAPHS.max_examples // 25))


@pytest.mark.slow
@settings(FEW)
@given(spec=nets, method=methods, baked=st.booleans())
def test_a_converted_network_is_one_graph(spec: Net, method: str, baked: bool) -> None:
    """Captured without a break, forward and backward; what the compiler makes of it is its own business."""
    model = build(spec)
    assume(differentiable(spec, model))
    new = converted(spec, method, model)
    if new is None:
        return
    new = bake(new).eval() if baked else new.eval()
    torch._dynamo.reset()
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    assert close(run(spec, new), run(spec, compiled), 1e-4)
    sum(t.sum() for t in run(spec, compiled, grad=True)).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or p.grad.isfinite().all() for p in new.parameters())


def differentiable(spec: Net, model: nn.Module) -> bool:
    """Whether backward works at all: not where an addition in place writes over what a tanh has kept."""
    twin = copy.deepcopy(model).eval()
    try:
        sum(t.sum() for t in run(spec, twin, grad=True)).backward()  # type: ignore[union-attr]
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            return False
        raise
    return True


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@settings(FEW)
@given(spec=nets, method=methods, baked=st.booleans())
def test_a_converted_network_is_exported(spec: Net, method: str, baked: bool) -> None:
    new = converted(spec, method, build(spec))
    if new is None:
        return
    new = bake(new).eval() if baked else new.eval()
    exported = torch.export.export(new, inputs(spec)).module()
    for seed in (0, 9):
        with torch.no_grad():
            assert close(leaves(new(*inputs(spec, seed))), leaves(exported(*inputs(spec, seed))), 1e-4)
