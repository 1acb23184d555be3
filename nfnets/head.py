"""Which layers of a model produce its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nfnets.given import check_module

# Where torchvision, timm and most private nets keep what makes the logits, auxiliary heads too.
_NAMES = ("fc", "classifier", "head", "heads", "head_dist", "last_linear", "logits")
_AUXILIARY = ("aux_classifier", "AuxLogits", "aux1", "aux2")
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside DataParallel, DistributedDataParallel and `torch.compile`'s wrapper."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore
        else:
            return model


def head_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that produce the logits: linears, or convolutions of a fully convolutional head.

    In this order: what timm's `get_classifier()` names; the last layer of `fc`, `classifier`, `head`, `heads`, … and
    of auxiliary heads (of every entry, if it is a list or dict of heads); the model's last layer, if it is a linear.

    Args:
        model: any module, wrapped in DDP or compiled too.

    Returns:
        The layers, as they are in the model; empty where it has none (`num_classes=0`).

    Raises:
        UserError: no module.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> head_layers(net)
        [Linear(in_features=8, out_features=10, bias=True)]
    """
    check_module(model)
    model = unwrap(model)
    classifier = getattr(model, "get_classifier", None)
    if callable(classifier):
        return list(dict.fromkeys(_last_layers(classifier())))
    named = [getattr(model, name, None) for name in _NAMES]
    if any(isinstance(part, nn.Module) for part in named):
        named += [getattr(model, name, None) for name in _AUXILIARY]
        return list(dict.fromkeys(layer for part in named for layer in _last_layers(part)))
    return [layer for layer in _last_layers(model) if isinstance(layer, nn.Linear)]


def _last_layers(part: Any) -> Iterator[nn.Module]:
    if isinstance(part, nn.ModuleDict):
        part = list(part.values())
    if isinstance(part, tuple | list | nn.ModuleList):
        for entry in part:
            yield from _last_layers(entry)
    elif isinstance(part, nn.Module):
        layers = [m for m in part.modules() if isinstance(m, _LAYERS)]
        yield from layers[-1:]
