"""What was given where a model, an optimizer or keyword inputs belong: one line for every mix-up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.errors import UserError


def check_module(value: Any, name: str = "model") -> None:
    """Refuse what is no module, say what it is, and what may have been meant.

    Args:
        value: what was given.
        name: of the argument.

    Raises:
        UserError: it is no `torch.nn.Module`.

    Example:
        >>> check_module(nn.Linear(2, 3).parameters())
        Traceback (most recent call last):
        ...
        nfnets.errors.UserError: model is a generator: expected a torch.nn.Module; pass the model, not its parameters
    """
    if not isinstance(value, nn.Module):
        raise UserError(f"{name} is {shown(value)}: expected a torch.nn.Module; {_remedy(value)}")


def check_optimizer(value: Any) -> None:
    """Refuse what is no optimizer.

    Raises:
        UserError: it is no `torch.optim.Optimizer`.
    """
    if isinstance(value, nn.Module):
        raise UserError(
            f"optimizer is {shown(value)}, a model: expected a torch.optim.Optimizer; the optimizer comes first"
        )
    if not isinstance(value, torch.optim.Optimizer):
        raise UserError(
            f"optimizer is {shown(value)}: expected a torch.optim.Optimizer; pass the inner one of a wrapper"
        )


def check_named(kwargs: Any) -> None:
    """Refuse keyword inputs that are no dict with names.

    Raises:
        UserError: neither None nor a mapping of texts.
    """
    if kwargs is None or (isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)):
        return
    raise UserError(
        f"kwargs is {shown(kwargs)}: expected a dict of the forward's keyword inputs; pass kwargs={{name: tensor}}"
    )


def check_tensor(value: Any, name: str = "weight") -> None:
    """Refuse what is no tensor.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, Tensor):
        remedy = (
            "pass the weight of one of its layers" if isinstance(value, nn.Module) else f"pass one as {name}"
        )
        raise UserError(f"{name} is {shown(value)}: expected a tensor; {remedy}")


def check_text(value: Any, name: str, example: str) -> None:
    """Refuse what is no text.

    Args:
        value: what was given.
        name: of the argument.
        example: of what could be passed.

    Raises:
        UserError: it is none.
    """
    if not isinstance(value, str):
        raise UserError(f"{name} is {shown(value)}: expected a text; pass one, as {example!r}")


def tensors_of(parameters: Any) -> list[Tensor]:
    """The tensors of `model.parameters()` or `model.named_parameters()`.

    Raises:
        UserError: no iterable, or one of something else.

    Example:
        >>> len(tensors_of(nn.Linear(2, 3).named_parameters()))
        2
    """
    if not isinstance(parameters, Iterable) or isinstance(parameters, str | type):
        raise UserError(
            f"parameters is {shown(parameters)}: expected a model or its parameters; pass model.parameters()"
        )
    entries = parameters.values() if isinstance(parameters, Mapping) else parameters
    found: list[Any] = [
        entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry for entry in entries
    ]
    for entry in found:
        if not isinstance(entry, Tensor):
            raise UserError(f"parameters hold {shown(entry)}: expected tensors; pass model.parameters()")
    return found


def counted(count: int, noun: str) -> str:
    """A number of things in words.

    Example:
        >>> counted(1, "norm layer"), counted(4, "image")
        ('1 norm layer', '4 images')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shown(value: Any) -> str:
    """A value as an error names it: short, in one line.

    Example:
        >>> shown(None), shown(nn.Linear), shown(torch.ones(2, 3)), shown("net")
        ('None', 'the class Linear', 'a Tensor of shape (2, 3)', "'net'")
    """
    kind = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a {kind} of shape {tuple(value.shape)}"
    if isinstance(value, str | int | float) and len(repr(value)) < 40:
        return repr(value)
    return f"{'an' if kind[:1].lower() in 'aeio' else 'a'} {kind}"


def _remedy(value: Any) -> str:
    if isinstance(value, type):
        return f"pass an instance, as {value.__name__}(…)"
    if isinstance(value, Tensor):
        return "models come first, then what they run on"
    if isinstance(value, torch.optim.Optimizer):
        return "pass the model whose parameters it steps"
    if isinstance(value, Iterator):
        return "pass the model, not its parameters"
    if isinstance(value, Mapping):
        return "load a state_dict into a model and pass that"
    if isinstance(value, str):
        return "pass a model, as from nfnets.create_model(name)"
    if callable(getattr(value, "module", None)):
        return "pass its .module()"
    if callable(value):
        return "wrap the function in a module"
    return "pass the model itself"
