"""Example inputs by keyword, and the mode in which a model shows most of its norm layers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from nfnets.errors import UserError
from nfnets.nested import fresh, tensors_in
from nfnets.noise import keyed
from nfnets.structure.norms import norm_layers
from nfnets.trace import Graph, Visit, preserved, trace


class Example(NamedTuple):
    """What a model is run on: `model(*inputs, **named)`."""

    inputs: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def listed(self) -> tuple[Any, ...]:
        """All of them in a row, for methods, which need not know of names: see `completed`."""
        return *self.inputs, *self.named.values()


def example(inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Example:
    """Example inputs as they were given: nothing is added, and nothing goes by another way.

    Raises:
        UserError: no tensor among them.

    Example:
        >>> import torch
        >>> example((), {"input": torch.ones(2)}).listed
        (tensor([1., 1.]),)
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
    return Example(inputs, dict(kwargs or {}))


def fullest_graph(
    model: nn.Module, given: Example, visit: Visit | None = None, norms: Mapping[str, nn.Module] | None = None
) -> tuple[Graph, bool | None]:
    """The model's graph in the mode it is in, or in the other one if more norm layers run there.

    Auxiliary heads run in training only; detection models want targets in training only. While `visit` looks, norm
    layers normalize by the batch, whatever mode they are in, as those of an untrained model do nothing else. What is
    measured is for training: a model in evaluation mode is looked at in training mode if that draws random numbers
    (dropout, stochastic depth).

    Args:
        model: is left as it was.
        given: what it is run on.
        visit: as for `trace`.
        norms: the norm layers to look for, by path; None for every BatchNorm.

    Returns:
        The graph, and the mode that `finish` needs to see the same one; None for the model's own.

    Raises:
        UserError: the model rejects the inputs in either mode.
    """
    norms = norm_layers(model) if norms is None else norms
    noisy = visit is not None and not model.training and _draws(model, given)
    first, second = (True, None) if noisy else (None, not model.training)
    layers = norms.values()
    graph = _traced(model, given, visit, first, layers)
    missing = norms if isinstance(graph, UserError) else [path for path in norms if not graph.calls(path)]
    if isinstance(graph, UserError) or missing:
        other = _traced(model, given, visit, second, layers)
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


def _traced(
    model: nn.Module, given: Example, visit: Visit | None, mode: bool | None, norms: Collection[nn.Module]
) -> Graph | UserError:
    with in_mode(model, mode), keyed(model):
        return _measured(model, given, visit, norms)


def _measured(
    model: nn.Module, given: Example, visit: Visit | None, norms: Collection[nn.Module]
) -> Graph | UserError:
    if visit is not None:
        with _batch_statistics(norms):
            try:
                return _trace(model, given, visit, norms)
            except UserError:  # one value in a channel, perhaps
                pass
    try:
        return _trace(model, given, None, norms)
    except UserError as error:
        return error


def _trace(model: nn.Module, given: Example, visit: Visit | None, norms: Collection[nn.Module]) -> Graph:
    with completed(model, given):  # whatever the names are: `trace` has some of its own
        return trace(model, *given.listed, visit=visit, norms=frozenset(norms))


@contextlib.contextmanager
def _batch_statistics(norms: Collection[nn.Module]) -> Iterator[None]:
    before = {norm: norm.training for norm in norms}
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
def completed(model: nn.Module, given: Example) -> Iterator[None]:
    """Calls of the model with `given.listed` become such with keywords: it is called as its user calls it.

    Example:
        >>> import torch
        >>> given = example((torch.ones(2),), {"alpha": 2.0})
        >>> class Model(nn.Module):
        ...     def forward(self, x, *, alpha):
        ...         return alpha * x
        >>> model = Model()
        >>> with completed(model, given):
        ...     model(*given.listed)
        tensor([2., 2.])
    """
    first = len(given.inputs)

    def named(module: nn.Module, args: tuple[Any, ...], own: dict[str, Any]) -> Any:
        return args[:first], dict(zip(given.named, args[first:], strict=False)) | own

    # First, for the user's hooks are to see the call that the user makes.
    hook = model.register_forward_pre_hook(named, prepend=True, with_kwargs=True) if given.named else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
