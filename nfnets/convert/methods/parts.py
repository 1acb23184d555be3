"""What methods put in a layer's place, made from that layer alone; what the surroundings decide: `rows.py`."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nfnets.computed import has_own_weight
from nfnets.convert.fused import after, like
from nfnets.copying import twin_of
from nfnets.functional import EPS
from nfnets.layers import Scale, fan_in, scaled_std_class
from nfnets.scale.knob import knob
from nfnets.structure.own_forward import units, with_parameters


def copying(norm: nn.Module) -> nn.Module:
    """A copy of the tensor in a norm layer's place."""
    return after(norm, Scale(1.0, **like(norm)))


def with_own_activation(norm: nn.Module) -> nn.Module:
    """What was fused into a norm layer, alone; its activation does not write over what it reads."""
    new = after(norm)
    for name, child in new.named_children():
        if getattr(child, "inplace", False):
            apart = twin_of(child)
            apart.inplace = False  # type: ignore[assignment]
            setattr(new, name, apart)
    return new


def scaled(alpha: float, norm: nn.Module) -> nn.Module:
    """A constant in a norm layer's place."""
    return after(norm, Scale(alpha, **like(norm)))


def biased(layer: nn.Module, shift: Tensor | None = None) -> nn.Module:
    """The layer with a bias, 0 at first: the norm layer's shift is what it would lose with the norm layer. It learns
    where the shift did, or anything of the layer's does."""
    if layer.bias is not None:
        return layer
    own = next(layer.parameters())  # reading a computed weight would run what computes it
    twin = with_parameters(layer, bias=own.new_zeros(units(layer)).detach())
    if shift is not None and shift.requires_grad:
        twin.bias.requires_grad_()  # type: ignore[operator]
    return twin


def standardized(layer: nn.Module, alpha: float = 1.0, key: str | None = None) -> nn.Module:
    """The layer's scaled-standardized twin; with a key, a bias that it did not have starts as torch draws one."""
    kind = scaled_std_class(layer)
    assert kind is not None
    twin = kind.from_plain(layer, alpha=alpha)
    bias = twin.bias
    if key is not None and layer.bias is None and bias is not None and not bias.is_meta:
        generator = torch.Generator().manual_seed(crc32(key.encode()))
        drawn = torch.rand(len(bias), generator=generator, device="cpu")
        bias.detach().copy_((2 * drawn - 1) / fan_in(twin) ** 0.5)
    return twin


def standardizable(module: nn.Module | None) -> bool:
    """Whether scaled weight standardization makes sense of a layer."""
    return not plain_because(module)


def plain_because(module: nn.Module | None) -> str:
    """Why a layer stays plain where others are standardized; empty if it does not.

    Without its mean a filter of equal weights (a box, a mean over channels) is nothing, and one that is not to change
    is another.

    Example:
        >>> box = nn.Conv2d(1, 1, 3, bias=False)
        >>> plain_because(box), plain_because(box.requires_grad_(False))
        ('', 'frozen')
        >>> _ = nn.init.constant_(box.requires_grad_().weight, 1 / 9)
        >>> plain_because(box)
        'a filter of equal weights'
    """
    if module is None or not has_own_weight(module):
        return "its weight or forward is its own"
    groups = getattr(module, "groups", 1)
    if (groups > 1 and groups == getattr(module, "in_channels", 0)) or fan_in(module) < 2:
        return "depthwise or fan-in 1"
    if not module.weight.requires_grad:
        return "frozen"
    return "a filter of equal weights" if _loses_a_filter(module) else ""


def _loses_a_filter(layer: nn.Module) -> bool:
    """Whether standardization leaves next to nothing of a filter: what it divides by has a floor, and the filter's
    weights differ by less than a hundredth of their mean. Zeros have nothing to lose."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    found = knob(layer)
    if weight.is_meta or isinstance(found, str):
        return False
    most, rows = 0.01 * EPS, found.rows(weight)
    # N · v is at least half the square of what two weights differ by: three tell that of almost every filter.
    for column in (0, rows.shape[1] // 2):
        rows = rows[(rows[:, column].float() - rows[:, -1].float()).square() < 3 * most]
    if not len(rows):
        return False
    variance, mean = torch.var_mean(rows.float(), 1, correction=0)
    return bool(((fan_in(layer) * variance < most) & (variance < 1e-4 * mean.square())).any())


def channels_of(norm: nn.Module) -> int:
    """The number of channels a norm layer is made for."""
    known = getattr(norm, "num_features", None)
    return int(known) if known is not None else len(norm.running_mean)  # type: ignore[arg-type]


def learns(norm: nn.Module, name: str) -> bool:
    """Whether what stands for a norm layer's γ (`"weight"`) or β (`"bias"`) is to learn: not where that is a parameter
    without gradients. Where there is none, or a frozen buffer, it is."""
    own = norm._parameters.get(name)
    return own is None or own.requires_grad


def carry_affine(norm: nn.Module, to: nn.Module) -> None:
    """Give the norm layer's γ and β to its replacement: the parameters themselves, or copies of frozen buffers, which
    learn."""
    for name in ("weight", "bias"):
        value = getattr(norm, name, None)
        if isinstance(value, Tensor):
            setattr(to, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value.clone()))


def group_count(channels: int, positions: int, most: int = 32, least: int = 16) -> int:
    """The largest number of groups with 2 channels or more and, over space, 16 values or more in each; else 1.

    A group of two values is normalized to ±1 whatever they were, so features without space get fewer groups.

    Example:
        >>> group_count(64, 49), group_count(24, 49), group_count(64, 1), group_count(7, 49)
        (32, 12, 4, 1)
    """
    fitting = (
        groups
        for groups in range(min(most, channels // 2), 0, -1)
        if channels % groups == 0 and channels // groups * positions >= least
    )
    return next(fitting, 1)


def on_meta(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether there are no values to measure or to set: they come with the `state_dict` that is loaded."""
    tensors = [*model.parameters(), *tree_leaves(inputs)]
    return any(t.is_meta for t in tensors if isinstance(t, Tensor))
