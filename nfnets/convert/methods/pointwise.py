"""`dyt` and `derf`: a bounded function of each value in every norm layer's place."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from nfnets.convert.fused import after, like
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import learns
from nfnets.convert.methods.rows import law_at, site_row
from nfnets.convert.net import Net
from nfnets.convert.plan import Change, Edit, Start
from nfnets.errors import UserError
from nfnets.nested import tensors_in
from nfnets.pointwise import DynamicErf, DynamicTanh
from nfnets.scale.one_pass import one_pass, transaction
from nfnets.structure.laws import KINDS, Law

START = 0.5
"""α of the papers; of a measured α, what it makes of an input's root mean square."""


@register
@dataclass
class DyT(Method):
    """Dynamic tanh: y = γ · tanh(α · x) + β in every norm layer's place; no statistics at any time.

    γ and β are the norm layer's own; what it lacks is not added. α is one number a layer and learns. Made for layer
    and RMS norms. In BatchNorm's place it loses, its authors say so themselves (docs/experiments.md, "Any norm").

    Args:
        alpha: α at first. "measured" for 0.5 / √E[x²] of what each layer reads on the example inputs, in one forward
            pass, each layer set before it runs; that is the papers' 0.5 where the root mean square is 1.

    Example:
        >>> from nfnets.convert import convert
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
        >>> convert(model, torch.randn(2, 8), method="dyt", norms="layer")[1]
        DynamicTanh(4, alpha=0.5)

    Paper: arXiv 2503.10622. Checked against the formula of `jiachenzhu/DyT`.
    """

    name = "dyt"
    carries = KINDS
    channels_only = False
    layer: ClassVar[type[DynamicTanh | DynamicErf]] = DynamicTanh
    alpha: float | Literal["measured"] = START

    def __post_init__(self) -> None:
        if self.alpha != "measured" and not 0 < self.alpha < math.inf:
            raise UserError(f'alpha={self.alpha}: expected a finite number above 0; pass 0.5 or "measured"')

    def decide(self, net: Net) -> Iterator[Change | Start]:
        measured = self.alpha == "measured"
        start = START if self.alpha == "measured" else self.alpha
        why = f"α = {START:g}/√(mean square), measured" if measured else f"α = {start:g}"
        for site in net.sites:
            edit = Edit(site.path, partial(_pointwise, self.layer, start, law_at(site)))
            yield site_row(site, "replace", self.layer.__name__, why, edit)
        if measured:
            paths = [site.path for site in net.sites]
            yield Start(partial(measure_alpha_, paths=paths), "α measured")


@register
@dataclass
class Derf(DyT):
    """Dynamic erf: y = γ · erf(α · x + s) + β in every norm layer's place; as `dyt`, and s learns, 0 at first.

    Args:
        alpha: as for `dyt`.

    Paper: arXiv 2512.10938. Checked against the formula of `zlab-princeton/Derf`.
    """

    name = "derf"
    layer = DynamicErf


def _pointwise(layer: type[DynamicTanh | DynamicErf], alpha: float, law: Law, norm: nn.Module) -> nn.Module:
    new = layer(law.shape, alpha, law.dim, affine=False, **like(norm))
    for name, own in (("weight", law.gamma), ("bias", law.beta)):
        value = getattr(norm, own) if own else None
        if value is None:
            continue
        kept = isinstance(value, nn.Parameter) and value.shape == law.shape  # tied ones stay tied
        trained = value.requires_grad or not isinstance(value, nn.Parameter)
        copied = None if kept else nn.Parameter(value.detach().clone().reshape(law.shape), trained)
        setattr(new, name, value if copied is None else copied)
    if not learns(norm, law.gamma):  # a frozen layer stays frozen
        for parameter in (new.alpha, getattr(new, "shift", None)):
            if parameter is not None:
                parameter.requires_grad_(False)
    return after(norm, new)


def measure_alpha_(model: nn.Module, *inputs: Any, paths: Collection[str]) -> None:
    """Set α of pointwise layers to 0.5 / √E[x²] of what they read at their first call, in one forward pass.

    A layer that reads zeros, or what is not finite, keeps its α.

    Args:
        model: changed in place, or not at all if its forward raises.
        *inputs: example inputs.
        paths: of the layers, or of what holds one, an activation fused to it.
    """
    layers = {
        layer
        for path in paths
        for layer in model.get_submodule(path).modules()
        if isinstance(layer, DynamicTanh | DynamicErf)
    }
    with transaction() as write:

        def set_alpha(layer: nn.Module, *given: Any) -> None:
            if layer in waiting:
                waiting.remove(layer)
                own: Any = layer.alpha
                (x,) = tensors_in(given)
                wide = torch.promote_types(x.dtype, torch.float32)
                square = torch.linalg.vector_norm(x, dtype=wide).square() / x.numel()
                alpha = (START * square.rsqrt()).to(own.dtype)
                write(own, torch.where(alpha.isfinite() & (alpha > 0), alpha, own.detach()))

        waiting: set[nn.Module] = set(layers)
        handles = [layer.register_forward_pre_hook(set_alpha, with_kwargs=True) for layer in layers]
        try:
            one_pass(model, *inputs, select=lambda module: False, rescale=lambda call: None)
        finally:
            for handle in handles:
                handle.remove()
