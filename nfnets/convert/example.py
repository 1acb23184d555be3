"""Example inputs by keyword, and the mode in which a model shows most of its norm layers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from nfnets.convert.sites import norm_layers
from nfnets.errors import UserError
from nfnets.nested import fresh, tensors_in
from nfnets.noise import keyed
from nfnets.trace import Graph, Visit, preserved, trace


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

    Auxiliary heads run in training only; detection models want targets in training only. While `visit` looks, norm
    layers normalize by the batch, whatever mode they are in, as those of an untrained model do nothing else. What is
    measured is for training: a model in evaluation mode is looked at in training mode if that draws random numbers
    (dropout, stochastic depth).

    Returns:
        The graph, and the mode that `finish` needs to see the same one; None for the model's own.

    Raises:
        UserError: the model rejects the inputs in either mode.
    """
    norms = norm_layers(model)
    noisy = visit is not None and not model.training and _draws(model, given)
    first, second = (True, None) if noisy else (None, not model.training)
    graph = _traced(model, given, visit, first)
    missing = norms if isinstance(graph, UserError) else [path for path in norms if not graph.calls(path)]
    if isinstance(graph, UserError) or missing:
        other = _traced(model, given, visit, second)
        if isinstance(other, Graph) and (isinstance(graph, UserError) or any(map(other.calls, missing))):
            return other, second
    if isinstance(graph, UserError):
        raise graph
    return graph, first


def _draws(model: nn.Module, given: Example) -> bool:
    """Whether a pass in training draws random numbers."""
    with in_mode(model, True), preserved(model), torch.no_grad(), keyed(model) as drawn:
        inputs, named = fresh((given.inputs, given.named))
        try:
            model(*inputs, **named)
        except Exception:  # it wants targets, or a larger batch
            return False
        return drawn()


def _traced(model: nn.Module, given: Example, visit: Visit | None, mode: bool | None) -> Graph | UserError:
    with in_mode(model, mode), keyed(model):
        return _measured(model, given, visit)


def _measured(model: nn.Module, given: Example, visit: Visit | None) -> Graph | UserError:
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
