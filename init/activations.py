"""Modules in other modules' places."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def replace_modules(model: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> None:
    """Put each twin everywhere where its module stands; modes are taken over.

    Args:
        model: changed in place.
        twins: by what they replace; the model itself is none.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> replace_modules(model, {model[1]: nn.Tanh()})
        >>> model[1]
        Tanh()
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in twins:
                twin = twins[child].train(child.training)
                setattr(parent, name, twin)
