"""What is fused into a norm layer: the dropout and the activation that stay when it goes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn


def activation_of(norm: nn.Module) -> nn.Module | None:
    """The activation fused into a norm layer (timm's `BatchNormAct2d`), or None."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) and not isinstance(act, nn.Identity) else None


def fused(norm: nn.Module) -> dict[str, nn.Module]:
    """The dropout and activation fused into a norm layer, by name, in the order in which they run.

    Example:
        >>> fused(nn.BatchNorm2d(3))
        {}
    """
    parts: dict[str, nn.Module] = {}
    drop, activation = getattr(norm, "drop", None), activation_of(norm)
    if isinstance(drop, nn.Module) and not isinstance(drop, nn.Identity):
        parts["drop"] = drop
    if activation is not None:
        parts["act"] = activation
    return parts


def after(norm: nn.Module, replacement: nn.Module | None = None) -> nn.Module:
    """What stands at a norm layer's place: the replacement, then the dropout and activation fused into it.

    They keep their paths, `drop` and `act`; the replacement is then `norm`.

    Example:
        >>> type(after(nn.BatchNorm2d(3), nn.GroupNorm(1, 3))).__name__
        'GroupNorm'
    """
    parts = fused(norm)
    plain = nn.Identity() if replacement is None else replacement
    held = parts if replacement is None else {"norm": replacement} | parts
    return (nn.Sequential(OrderedDict(held)) if parts else plain).train(norm.training)


def like(norm: nn.Module) -> dict[str, Any]:
    """Device and type of a norm layer's parameters, for what replaces it."""
    tensors = (t for t in [*norm.parameters(), *norm.buffers()] if t.is_floating_point())
    first = next(tensors, None)
    return {} if first is None else {"device": first.device, "dtype": first.dtype}


def held_at(path: str, norm: nn.Module) -> str:
    """Where the replacement stands that `after` puts in a norm layer's place."""
    return f"{path}.norm" if fused(norm) else path
