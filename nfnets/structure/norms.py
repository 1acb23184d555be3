"""Norm layers by what they normalize over."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from torch import nn

from nfnets.trace import is_batch_norm_like

NormKind = Literal["batch", "group", "instance", "layer", "rms"]
KINDS: tuple[NormKind, ...] = get_args(NormKind)


def norm_kind(module: nn.Module) -> NormKind | None:
    """What a norm layer normalizes over; None for any other module.

    `"batch"`: a channel over samples and positions, or by running statistics; `"group"`: a sample's group of channels;
    `"instance"`: a sample's channel over positions; `"layer"`: the last dimensions of a sample or position; `"rms"`: as
    that, but the mean is left.

    Example:
        >>> [norm_kind(layer) for layer in (nn.BatchNorm2d(4), nn.LayerNorm(4), nn.RMSNorm(4), nn.ReLU())]
        ['batch', 'layer', 'rms', None]
    """
    if is_batch_norm_like(module):
        return "batch"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "instance"
    for kind, known in (("group", nn.GroupNorm), ("layer", nn.LayerNorm), ("rms", nn.RMSNorm)):
        if isinstance(module, known):
            return kind  # type: ignore[return-value]
    return None


def norm_layers(model: nn.Module, kinds: Collection[NormKind] = ("batch",)) -> dict[str, nn.Module]:
    """Norm layers of some kinds by path; one inside another (split batch norm) goes with it.

    Example:
        >>> list(norm_layers(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LayerNorm(3))))
        ['1']
    """
    norms: dict[str, nn.Module] = {}
    last = None
    for path, module in model.named_modules():  # what is inside a module follows it at once
        inside = last is not None and path.startswith(f"{last}.")
        if not inside and norm_kind(module) in kinds:
            norms[path], last = module, path
    return norms
