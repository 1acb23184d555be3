"""Names of models and what builds them."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nfnets.errors import UserError, unknown
from nfnets.given import check_text, shown

Builder = Callable[..., nn.Module]

_BUILDERS: dict[str, Builder] = {}


def register(name: str, builder: Builder) -> None:
    """Make `create_model(name)` call `builder`.

    Args:
        name: what users type. Lower case, words joined by underscores.
        builder: called with `create_model`'s keyword arguments.

    Raises:
        UserError: `name` is no text, empty or taken by another builder, or `builder` is no function.
    """
    check_text(name, "name", "my_resnet20")
    if not name.strip():
        raise UserError(f"name is {name!r}: expected a name, e.g. 'my_resnet20'")
    if not callable(builder):
        raise UserError(
            f"builder is {shown(builder)}: expected a function that returns a model; pass it uncalled"
        )
    if _BUILDERS.setdefault(name, builder) is not builder:
        raise UserError(f"model {name!r} is already registered; choose another name")


def list_models(pattern: str = "*") -> list[str]:
    """The names `create_model` knows.

    Args:
        pattern: shell-style, e.g. `"*_cifar"`.

    Returns:
        Sorted names that match; empty if none does.

    Raises:
        UserError: `pattern` is no text.

    Example:
        >>> list_models("bn_resnet?_cifar")
        ['bn_resnet8_cifar']
    """
    check_text(pattern, "pattern", "*_cifar")
    return sorted(name for name in _BUILDERS if fnmatch.fnmatchcase(name, pattern))


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Build the model of this name, freshly initialized.

    Args:
        name: one of `list_models()`; `nfnet_f4+`, as the paper writes it, is `nfnet_f4_plus`.
        **kwargs: for the model, e.g. `num_classes`, `in_chans`.

    Returns:
        The model, in training mode.

    Raises:
        UserError: no such name (the nearest ones are given), or an argument the model does not take.

    Example:
        >>> create_model("bn_resnet8_cifar", num_classes=7).fc.out_features
        7
    """
    build = builder(name)
    try:
        inspect.signature(build).bind(**kwargs)
    except TypeError as error:
        known = ", ".join(inspect.signature(build).parameters)
        raise UserError(f"model {name!r}: {error}; it takes {known}") from None
    return build(**kwargs)


def builder(name: str) -> Builder:
    """What `create_model` calls for this name; a UserError if nothing."""
    check_text(name, "name", "nf_resnet50")
    name = name.replace("+", "_plus")
    if name not in _BUILDERS:
        raise unknown("model", name, _BUILDERS)
    return _BUILDERS[name]
