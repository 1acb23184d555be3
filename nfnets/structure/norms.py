"""Norm layers by what they normalize over."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from nfnets.errors import UserError, unknown
from nfnets.structure.laws import KINDS, NormKind, law_of
from nfnets.trace import is_batch_norm_like


def norm_kind(module: nn.Module) -> NormKind | None:
    """What a norm layer normalizes over; None for any other module.

    `"batch"`: a channel over samples and positions, or by running statistics; `"group"`: a sample's group of channels;
    `"instance"`: a sample's channel over positions; `"layer"`: the last dimensions of a sample or position, or its
    channels in dimension 1; `"rms"`: as that, but the mean is left. Layers that derive from none of torch's are tried,
    see `law_of`.

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
    law = law_of(module)
    return None if law is None else law.kind


def norm_layers(model: nn.Module, kinds: Collection[NormKind] = ("batch",)) -> dict[str, nn.Module]:
    """Norm layers of some kinds by path; one inside another (split batch norm) goes with it.

    Example:
        >>> list(norm_layers(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LayerNorm(3))))
        ['1']
    """
    is_wanted = is_batch_norm_like if set(kinds) == {"batch"} else lambda module: norm_kind(module) in kinds
    norms: dict[str, nn.Module] = {}
    last = None
    for path, module in model.named_modules():  # what is inside a module follows it at once
        inside = last is not None and path.startswith(f"{last}.")
        if not inside and is_wanted(module):
            norms[path], last = module, path
    return norms


def unknown_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that are called a norm and are none of the kinds that are known, by path.

    Example:
        >>> list(unknown_norms(nn.Sequential(nn.LocalResponseNorm(2), nn.LayerNorm(2))))
        ['0']
    """
    return {
        path: module
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not any(module.children())
        and not type(module).__module__.startswith(("torch.nn.utils.", "nfnets."))
        and norm_kind(module) is None
    }


def kinds_of(norms: Any) -> tuple[NormKind, ...]:
    """The kinds of norm layers that `norms=` names.

    Args:
        norms: `"all"`, a kind, or a sequence of kinds.

    Raises:
        UserError: no such kind, or none at all.

    Example:
        >>> kinds_of("batch"), kinds_of(["layer", "rms"])
        (('batch',), ('layer', 'rms'))
    """
    if isinstance(norms, str) and norms == "all":
        return KINDS
    named = (norms,) if isinstance(norms, str) else norms
    if not isinstance(named, Sequence) or not named or not all(isinstance(kind, str) for kind in named):
        raise UserError(
            f"norms={norms!r}: expected 'all', or kinds of norm layers; pass norms='all', or some of {', '.join(KINDS)}"
        )
    for kind in named:
        if kind not in KINDS:
            raise unknown("kind of norm layers", kind, (*KINDS, "all"))
    return tuple(kind for kind in KINDS if kind in named)
