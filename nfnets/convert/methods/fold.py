"""`fold`: keep a trained network's evaluation function, without its norm layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.convert.fused import after
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import learns
from nfnets.convert.methods.rows import site_row
from nfnets.convert.net import Net
from nfnets.convert.own_norm import eps_of, statistics_of
from nfnets.convert.plan import Change, Edit
from nfnets.layers import ChannelAffine
from nfnets.structure.own_forward import affine_in_parameters, with_parameters
from nfnets.structure.sites import Site
from nfnets.structure.walk import is_hooked
from nfnets.trace import Graph
from nfnets.tuned import normalized_bias, normalizing, times


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Multiplier γ/√(σ²+ε) and shift β − μ·γ/√(σ²+ε) of a norm layer in evaluation mode, in fp64."""
    mean, variance = (statistic.double() for statistic in statistics_of(norm))
    gamma, beta, eps = getattr(norm, "weight", None), getattr(norm, "bias", None), eps_of(norm)
    multiplier = normalizing(variance, gamma, eps).detach()
    return multiplier, normalized_bias(mean, variance, gamma, beta, eps).detach()


def folded(norm: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The layer's weight and bias with the norm layer's evaluation-mode affine map in them, in fp64."""
    multiplier, shift = affine_of(norm)
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    groups: Any = layer.groups if transposed else 1
    return times(weight.double(), multiplier, int(transposed), groups), _shifted(layer, multiplier, shift)


def _shifted(layer: nn.Module, multiplier: Tensor, shift: Tensor) -> Tensor:
    bias = layer.bias
    return shift if bias is None else shift + bias.detach().double() * multiplier  # type: ignore[operator]


def fold_into(norm: nn.Module, layer: nn.Module) -> nn.Module:
    """The layer with the norm layer's evaluation-mode affine map in its weight and bias."""
    dtype: torch.dtype = layer.weight.dtype  # type: ignore[assignment]
    weight, bias = folded(norm, layer)
    twin = with_parameters(layer, weight=weight.to(dtype), bias=bias.to(dtype))
    shifts = [p for p in (layer._parameters.get("bias"), norm._parameters.get("bias")) if p is not None]
    if shifts:
        twin.bias.requires_grad_(any(p.requires_grad for p in shifts))  # type: ignore[operator]
    return twin


def as_affine(norm: nn.Module) -> nn.Module:
    """The norm layer's evaluation-mode map as a trainable per-channel affine, with its fused activation."""
    multiplier, shift = affine_of(norm)
    affine = ChannelAffine(multiplier.numel(), device=multiplier.device, dtype=_dtype_of(norm))
    with torch.no_grad():
        affine.weight.copy_(multiplier)
        affine.bias.copy_(shift)
    for name, parameter in affine.named_parameters():
        parameter.requires_grad_(learns(norm, name))
    return after(norm, affine)


def _dtype_of(norm: Any) -> torch.dtype:
    weight = getattr(norm, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else norm.running_mean.dtype


def _fits(dtype: torch.dtype, *values: Tensor) -> bool:
    """Whether numbers in fp64 are finite in a dtype."""
    return all(value.is_meta or bool(value.to(dtype).isfinite().all()) for value in values)


def _folds(norm: nn.Module, layer: nn.Module) -> bool:
    """Whether a norm layer's affine map leaves a layer's weight and bias finite in its dtype. No product is larger than
    that of the largest factors, which costs a tenth of all of them."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment, operator]
    if weight.numel() and not weight.is_meta:
        multiplier, shift = affine_of(norm)
        most = torch.stack(weight.aminmax()).abs().amax().double() * multiplier.abs().amax()
        if bool(most <= torch.finfo(weight.dtype).max):
            return _fits(weight.dtype, _shifted(layer, multiplier, shift))
    return _fits(weight.dtype, *folded(norm, layer))


@register
@dataclass
class Fold(Method):
    """Running statistics folded into the convolution, or a per-channel affine where no convolution precedes.

    W ← W · γ/√(σ²+ε), b ← (b − μ) · γ/√(σ²+ε) + β; computed in fp64, kept in the layer's dtype. Only where nothing but
    the norm layer reads the convolution's output and nothing but the convolution its weight, no forward hook is on
    either, and the weight stays finite in its dtype (fp16 may overflow): else the affine stands, with the norm layer's
    hooks. Frozen layers stay frozen.

    Example:
        >>> from nfnets.convert import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(convert(model, x, method="fold")(x), model(x), atol=1e-5)
        True

    Checked against `torch.nn.utils.fusion.fuse_conv_bn_eval`.
    """

    name = "fold"
    keeps_function = True
    carries = ("batch", "instance")
    leaves_frozen = False

    def decide(self, net: Net) -> Iterator[Change]:
        for site in net.sites:
            yield self._change(net.graph, site)

    def _change(self, graph: Graph, site: Site) -> Change:
        if getattr(site.norm, "running_mean", None) is None:
            return site_row(site, "refuse", "", "it keeps no running statistics (track_running_stats=False)")
        if not all(t.is_meta or bool(t.isfinite().all()) for t in affine_of(site.norm)):
            return site_row(site, "refuse", "", "its statistics or affine map are not finite, or σ² + ε is 0")
        hooked = is_hooked(site.norm) or (site.feeder is not None and is_hooked(site.feeder.module))
        reason = "forward hooks see it" if hooked else "no convolution feeds it alone"
        if site.feeder is not None and not hooked and affine_in_parameters(graph, site.feeder):
            layer: Any = site.feeder.module
            if _folds(site.norm, layer):
                edits = (Edit(site.feeder.path, partial(fold_into, site.norm)), Edit(site.path, after))
                return site_row(
                    site, "replace", "Identity", f"its affine map is folded into {site.feeder.path}", *edits
                )
            reason = f"folded into {site.feeder.path} it would overflow {layer.weight.dtype}"
        dtype = _dtype_of(site.norm)
        if not _fits(dtype, *affine_of(site.norm)):
            why = f"its affine map overflows {dtype}; fold the model in float32, then cast it"
            return site_row(site, "refuse", "", why)
        return site_row(site, "replace", "ChannelAffine", reason, Edit(site.path, as_affine))
