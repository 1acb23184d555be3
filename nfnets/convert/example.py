"""Example inputs by keyword, and the mode in which a model shows most of its norm layers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from nfnets.errors import UserError
from nfnets.nested import tensors_in
from nfnets.structure.sites import norm_layers
from nfnets.trace import Graph, Visit, trace


class Example(NamedTuple):
    """What a model is run on: `model(*inputs, **named)`."""

    inputs: tuple[Any, ...]
    named: dict[str, Any]
    """Only what cannot be given by position."""


def example(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Example:
    """Keyword inputs put at their positions, so that methods need not know of them.

    Raises:
        UserError: no tensor among them, or the forward does not take these arguments.

    Example:
        >>> import torch
        >>> example(nn.Conv2d(3, 4, 1), (), {"input": torch.ones(2)})
        Example(inputs=(tensor([1., 1.]),), named={})
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise UserError(
            f"kwargs is a {type(kwargs).__name__}: expected a dict of the forward's keyword inputs"
        )
    if not tensors_in(inputs, kwargs):
        given = ", ".join(type(each).__name__ for each in (*inputs, *(kwargs or {}).values())) or "nothing"
        raise UserError(
            f"no input tensor given, but {given}: expected a batch; pass what model(*inputs) takes"
        )
    if not kwargs:
        return Example(inputs, {})
    try:
        bound = inspect.signature(model.forward).bind(*inputs, **kwargs)
    except TypeError as error:
        kind = type(model).__name__
        raise UserError(f"{kind}.forward does not take these inputs: {error}; see its signature") from error
    bound.apply_defaults()
    return Example(bound.args, bound.kwargs)


def fullest_graph(model: nn.Module, given: Example, visit: Visit | None = None) -> tuple[Graph, bool | None]:
    """The model's graph in the mode it is in, or in the other one if more norm layers run there.

    Auxiliary heads run in training only; detection models want targets in training only. Norm layers normalize by the
    batch while `visit` looks, whatever mode they are in, as those of an untrained model do nothing else.

    Returns:
        The graph, and the mode that `finish` needs to see the same one; None for the model's own.

    Raises:
        UserError: the model rejects the inputs in either mode.
    """
    norms = norm_layers(model)
    graph = _traced(model, given, visit)
    missing = norms if isinstance(graph, UserError) else [path for path in norms if not graph.calls(path)]
    if isinstance(graph, UserError) or missing:
        mode = not model.training
        with in_mode(model, mode):
            other = _traced(model, given, visit)
        if isinstance(other, Graph) and (isinstance(graph, UserError) or any(map(other.calls, missing))):
            return other, mode
    if isinstance(graph, UserError):
        raise graph
    return graph, None


def _traced(model: nn.Module, given: Example, visit: Visit | None) -> Graph | UserError:
    if visit is not None:
        with _batch_statistics(model):
            try:
                return trace(model, *given.inputs, visit=visit, **given.named)
            except UserError:  # one value in a channel, perhaps
                pass
    try:
        return trace(model, *given.inputs, **given.named)
    except UserError as error:
        return error


@contextlib.contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    before = {norm: norm.training for norm in norm_layers(model).values()}
    for norm in before:
        norm.training = True
    try:
        yield
    finally:
        for norm, training in before.items():
            norm.training = training


@contextlib.contextmanager
def in_mode(model: nn.Module, mode: bool | None) -> Iterator[None]:
    """Train or evaluation mode for a while; None changes nothing."""
    if mode is None:
        yield
        return
    before = [(module, module.training) for module in model.modules()]
    model.train(mode)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def completed(model: nn.Module, named: dict[str, Any]) -> Iterator[None]:
    """Calls of the model get these keyword inputs, whoever makes them."""
    if not named:
        yield
        return
    hook = model.register_forward_pre_hook(lambda _, args, own: (args, named | own), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
