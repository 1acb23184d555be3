"""What Fixup and SkipInit read before they set anything: a network without norm layers, traced."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nfnets.errors import UserError
from nfnets.graph import Graph
from nfnets.scale.one_pass import check
from nfnets.structure.residual import Residual, residual_of
from nfnets.structure.walk import is_norm, name_of
from nfnets.trace import tensors_in, trace


def read_residual(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    what: str,
    layers: Collection[str] | None = None,
) -> Residual:
    """Trace the model and find its residual branches.

    Args:
        model: a residual network without batch norm layers.
        inputs, kwargs: what its forward takes.
        what: who asks, for the error messages.
        layers: as for `residual_of`; with them norm layers may stay elsewhere.

    Returns:
        Branches in execution order, and the layers outside them.

    Raises:
        UserError: norm layers, no residual branch, or a layer with two roles.
    """
    check(model, inputs, kwargs)
    graph = few_samples(model, inputs, kwargs)
    if layers is None:
        _refuse_norms(graph, what)
    return residual_of(model, graph, what, layers)


def few_samples(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """The model's graph on two samples of the batch, if it takes them: only shapes matter."""
    if len({t.shape[:1] for t in tensors_in(inputs, kwargs)}) == 1:
        few, named = tree_map_only(Tensor, lambda t: t[:2] if t.ndim else t, (inputs, kwargs))
        try:
            return trace(model, *few, **named)
        except UserError:  # what was cut is no batch
            pass
    return trace(model, *inputs, **kwargs)


def _refuse_norms(graph: Graph, what: str) -> None:
    norms = [node.path for node in graph.nodes if is_norm(node)]
    if norms:
        raise UserError(
            f"the model normalizes at {_shown(norms)}: {what} is for networks without norm layers; "
            f"convert it first, nfnets.convert(model, images, method={what.lower()!r})"
        )


def refuse_any_norm(graph: Graph, what: str) -> None:
    """Refuse norm layers of every kind, functions among them, for what reshapes the whole net."""
    norms = [n.path for n in graph.nodes if n.norm or (n.module is not None and "norm" in name_of(n))]
    if norms:
        raise UserError(
            f"the model normalizes at {_shown(norms)}: {what} is for networks without norm layers; put "
            "nn.Identity() in their place first (most builders take norm_layer=)"
        )


def _shown(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f", … ({len(paths)} in all)" if len(paths) > 3 else "")
