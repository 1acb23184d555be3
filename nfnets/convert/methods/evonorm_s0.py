"""`evonorm_s0`: one layer for normalization and activation, independent of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.fx
from torch import Tensor, nn

from nfnets.convert.fused import activation_of, after, like
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import carry_affine, channels_of, learns
from nfnets.convert.methods.rows import groups_or_reason, site_row
from nfnets.convert.net import Net
from nfnets.convert.own_norm import eps_of
from nfnets.convert.plan import Change, Edit
from nfnets.errors import UserError
from nfnets.structure.sites import Site
from nfnets.trace import Graph

# What EvoNorm's own x · σ(v · x) can stand for. A sigmoid or tanh that bounds its output is left where it is.
_ABSORBED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish)
_ABSORBED += (nn.Hardswish, nn.Softplus)


class EvoNormS0(nn.Module):
    """y = x · σ(v · x) / GroupStd(x) · γ + β over dimension 1, for inputs of any rank.

    GroupStd(x) = √(var_g + ε), the biased variance of a sample's group of channels, in at least fp32. Without `gate`,
    y = x / GroupStd(x) · γ + β, for a place where no activation follows.

    Args:
        num_features: channels.
        num_groups: groups; they divide the channels.
        eps: ε.
        gate: whether it activates.

    Example:
        >>> EvoNormS0(8, 2)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])

    Paper: arXiv 2004.02967. Checked against timm's `EvoNorm2dS0`, whose `apply_act=False` only scales and shifts.
    """

    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_features % num_groups:
            raise UserError(
                f"num_groups={num_groups} does not divide {num_features} channels; pass num_groups=1"
            )
        self.num_features, self.num_groups, self.eps = num_features, num_groups, eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if gate else None
        self.v: nn.Parameter | None
        self.register_parameter("v", v)

    def forward(self, input: Tensor) -> Tensor:
        return _evonorm_s0(input, self.v, self.weight, self.bias, self.num_groups, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}, gate={self.v is not None}"


@torch.fx.wrap  # it branches on the type of its input, into which torch.fx does not see
def _evonorm_s0(
    input: Tensor, v: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> Tensor:
    shape = (1, -1) + (1,) * (input.ndim - 2)
    wide = input if input.dtype == torch.float64 else input.float()
    grouped = wide.reshape(input.shape[0], num_groups, -1)  # len() would fix the batch size in an export
    inverse = (grouped.var(2, correction=0) + eps).rsqrt().to(input.dtype)
    inverse = inverse.repeat_interleave(len(weight) // num_groups, 1)
    factor = inverse.reshape(inverse.shape + (1,) * (input.ndim - 2)) * weight.reshape(shape)
    gated = input if v is None else input * (input * v.reshape(shape)).sigmoid()
    return (gated * factor + bias.reshape(shape)).to(input.dtype)  # as BatchNorm does


@register
@dataclass
class EvoNormS0Method(Method):
    """EvoNorm-S0 in place of every norm layer and of the activation behind it.

    y = x · σ(v · x) / GroupStd(x) · γ + β; γ, β and ε are the norm layer's, v is 1. It takes the activation's place
    where that is fused into the norm layer, or is a module that reads nothing but converted norm layers, each alone.
    Elsewhere (no activation behind, a function, a module that other layers share, as torchvision's ResNet blocks
    share their ReLU) the activation stays and y = x / GroupStd(x) · γ + β stands before it: applying two would halve
    the signal, and applying none but γ and β, as EvoNorm's authors do at block ends, would leave it without a scale.

    Args:
        num_groups: as for `gn`.

    Example:
        >>> from nfnets.convert import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> [type(layer).__name__ for layer in convert(model, torch.randn(2, 3, 8, 8), method="evonorm_s0")]
        ['Conv2d', 'EvoNormS0', 'Identity']

    Paper: arXiv 2004.02967. Checked against timm's `EvoNorm2dS0`.
    """

    name = "evonorm_s0"
    num_groups: int | None = None

    def __post_init__(self) -> None:
        if self.num_groups is not None and self.num_groups < 1:
            raise UserError(f"num_groups={self.num_groups}: expected 1 or more; pass num_groups=32")

    def decide(self, net: Net) -> Iterator[Change]:
        groups = {site.path: groups_or_reason(net.graph, site, self.num_groups) for site in net.sites}
        converted = [site for site in net.sites if isinstance(groups[site.path], int)]
        owned = _owned_activations(net.graph, converted)
        for site in net.sites:
            yield _change(site, groups[site.path], owned.get(site.path))


def _change(site: Site, groups: int | str, activation: str | None) -> Change:
    if isinstance(groups, str):
        return site_row(site, "refuse", "", groups)
    edits = []
    if isinstance(activation_of(site.norm), _ABSORBED):
        absorbed = "its fused activation"
    else:
        absorbed = activation
    if activation is not None:
        edits.append(Edit(activation, _nothing))
    note = (
        f"in place of {absorbed} too" if absorbed else "no activation of its own behind it: without the gate"
    )
    edits.append(Edit(site.path, partial(_evonorm, groups, absorbed is not None)))
    return site_row(site, "replace", "EvoNormS0", f"{groups} groups, {note}", *edits)


def _owned_activations(graph: Graph, sites: list[Site]) -> dict[str, str]:
    """For a site's path the path of the activation module that reads it, where norm layers alone own that module."""
    behind: dict[int, str] = {}  # call of a norm layer → the activation module that alone reads its output
    for site in sites:
        for call in site.calls:
            readers = [graph.nodes[i] for i in graph.consumers(call)]
            if len(readers) == 1 and isinstance(readers[0].module, _ABSORBED) and call not in graph.outputs:
                behind[call] = readers[0].path
    alone = {
        path
        for path in behind.values()
        if all(behind.get(node.inputs[0]) == path for node in graph.calls(path))
    }
    owners: dict[str, str] = {}
    for site in sites:
        paths = {behind.get(call) for call in site.calls}
        path = paths.pop() if len(paths) == 1 else None
        if path in alone and activation_of(site.norm) is None:
            owners[site.path] = path
    # A module that reads a site which keeps another activation would go missing there: it must be owned at each call.
    kept = {
        path
        for site in sites
        for call in site.calls
        if (path := behind.get(call)) is not None and site.path not in owners
    }
    return {site: path for site, path in owners.items() if path not in kept}


def _evonorm(groups: int, gate: bool, norm: nn.Module) -> nn.Module:
    new = EvoNormS0(channels_of(norm), groups, eps_of(norm), gate, **like(norm))
    carry_affine(norm, new)
    if new.v is not None:
        new.v.requires_grad_(learns(norm, "weight"))
        return new.train(norm.training)
    return after(norm, new)


def _nothing(activation: nn.Module) -> nn.Module:
    return nn.Identity().train(activation.training)
