"""Residual branches that start at zero, by the last layer of each; everything else is left."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.graph import Graph, Node
from nfnets.init.reading import few_samples
from nfnets.init.weights import FROZEN
from nfnets.scale.one_pass import check, transaction
from nfnets.scale.report import Report, Row
from nfnets.structure.residual import Branch, is_weight_node, residual_of
from nfnets.structure.walk import kills, name_of


def zero_gamma_(
    model: nn.Module, *inputs: Any, layers: Collection[str] | None = None, **kwargs: Any
) -> Report:
    """Start every residual branch at zero: γ of the norm layer that ends it, or its last weight layer where none does.

        x + γ · norm(…) + β   γ = β = 0            x + W · (…) + b   W = b = 0

    Nothing else is changed. A branch that an activation without slope at 0 (ReLU) ends is left, for behind one a zero
    never learns, and so is one that a SkipInit scalar of 0 ends.

    Args:
        model: a residual network, with norm layers or without, changed in place.
        *inputs: example inputs, as `model(*inputs)` takes them; only shapes matter.
        layers: paths of the weight layers to look at; None for all. Branches with none of them are left.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per layer that ends a branch.

    Raises:
        UserError: no residual branch, or inputs the model rejects; nothing is changed.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.resnet18(num_classes=10)
        >>> zero_gamma_(model, torch.randn(2, 3, 32, 32)).paths("set")[:2]
        ('layer1.0.bn2', 'layer1.1.bn2')

    Paper: arXiv 1706.02677 §5.1. Checked against torchvision's `zero_init_residual`.
    """
    check(model, inputs, kwargs)
    graph = few_samples(model, inputs, kwargs)
    net = residual_of(model, graph, "zero-γ", layers)
    with transaction() as write:
        rows: list[Row] = []
        for branch in net.branches:
            ending = _ending(graph, branch)
            if ending is None:
                rows.append(Row(branch.path or "the root", "skipped", _why(branch)))
                continue
            for path, what in ending.items():
                learns = False
                for parameter in _own(model.get_submodule(path)):
                    if parameter.requires_grad:
                        write(parameter, torch.zeros_like(parameter))
                        learns = True
                where = branch.path or "the root"
                rows.append(
                    Row(path, "set" if learns else "frozen", f"{what} of {where}" if learns else FROZEN)
                )
    for_all = {id(p) for row in rows if row.action == "set" for p in _own(model.get_submodule(row.path))}
    return Report(f"zero-γ, {len(net.branches)} branches, {len(for_all)} tensors", rows)


def _ending(graph: Graph, branch: Branch) -> dict[str, str] | None:
    """What ends a branch, by path, and why; None where a zero would never learn."""
    weights = [i for i in branch.nodes if is_weight_node(graph.nodes[i])]
    after = [i for i in sorted(branch.nodes) if not graph.followed(i, weights) and i not in weights]
    norms = [i for i in after if _scales(graph.nodes[i])]
    last = max(norms, default=None)
    behind = [i for i in after if last is None or i > last]
    if any(kills(graph.nodes[i]) for i in behind) or branch.multipliers:
        return None
    if last is not None:
        return {graph.nodes[last].path: "γ at the end"}
    return dict.fromkeys(branch.last, "the last layer")


def _why(branch: Branch) -> str:
    if branch.multipliers:
        return f"its scalar {branch.multipliers[0]} sets the size of the branch: use skipinit"
    return "an activation without slope at 0 ends the branch: a zero before it would never learn"


def _scales(node: Node) -> bool:
    own = {} if node.module is None else node.module._parameters
    return (node.norm or "norm" in name_of(node)) and own.get("weight") is not None


def _own(module: nn.Module) -> list[Tensor]:
    found = [module._parameters.get(name) for name in ("weight", "bias")]
    return [parameter for parameter in found if parameter is not None]
