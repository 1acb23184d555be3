"""Deployment: computed weights written into plain layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nfnets.computed import Computed, plain_class
from nfnets.convert.copies import own_copy, refuse_strays
from nfnets.convert.edits import exchange_modules, take_back
from nfnets.convert.example import in_mode
from nfnets.convert.holders import Undo
from nfnets.convert.onward import affines, folded_onward
from nfnets.errors import UserError
from nfnets.trace import trace
from nfnets.tuned import TunedNorm


@torch.inference_mode(False)
def bake(model: nn.Module, inplace: bool = False, inputs: Any = None) -> nn.Module:
    """Turn every layer with a computed weight into PyTorch's plain layer with the effective weight and bias.

    Scaled-standardized: W ← scale · alpha · gain · standardized W, b ← scale · alpha · bias. Tuned:
    W ← W · γ/√(σ²+ε), b ← β + (b − μ) · γ/√(σ²+ε); a `TunedNorm` becomes a `ChannelAffine`. Computed once: the function
    stays, the constraint goes, and training the result further trains a plain network.

    Args:
        model: any module. One without such layers comes back as it is, a copy.
        inplace: replace the layers of `model` itself. If `model` is such a layer, only the returned one is baked.
        inputs: example inputs, a tensor or a tuple of them. Where they are given, γ and β of `dyt` and `derf`,
            constants and per-channel affines are folded into the layers that alone read them, where that is exact:
            W ← W · diag(m), b ← b + W · s.

    Returns:
        The baked model: attribute paths, hooks, modes, devices, types and `requires_grad` as before; a layer that
        stands at several paths still does. It exports with `torch.export` and to ONNX like any plain model.

    Raises:
        UserError: not a module, or one whose copy would compute with the original's layers (its code reads the model
            by a global name): `inplace=True` is for those.

    Example:
        >>> from nfnets.layers import ScaledStdConv2d
        >>> bake(nn.Sequential(ScaledStdConv2d(3, 8, 3), nn.ReLU()))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
        )

    Paper: arXiv 2101.08692 §4.1. Checked against torch's own convolutions, torch.export and onnxruntime.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"bake({type(model).__name__}): expected a torch.nn.Module")
    target = model if inplace else own_copy(model)
    if isinstance(target, Computed | TunedNorm):
        return _plain_layer(target)
    layers = [module for module in target.modules() if isinstance(module, Computed | TunedNorm)]
    baked: dict[nn.Module, nn.Module] = {layer: _plain_layer(layer) for layer in layers}
    undo: list[Undo] = []
    try:
        exchange_modules(target, baked, undo)
        if inputs is not None:
            given = inputs if isinstance(inputs, tuple) else (inputs,)
            with in_mode(target, False):
                onward = folded_onward(trace(target, *given, norms=affines(target)))
            exchange_modules(target, onward, undo)
            baked |= onward
        refuse_strays(model, target, baked)
    except BaseException:
        take_back(undo)
        raise
    return target


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def _plain_layer(layer: Computed | TunedNorm) -> nn.Module:
    new = layer.plain() if isinstance(layer, TunedNorm) else _plain_weighted(layer)
    for name in (*_HOOKS, *_HOOK_FLAGS, "_is_full_backward_hook"):
        setattr(new, name, getattr(layer, name))
    return new.train(layer.training)


def _plain_weighted(layer: Computed) -> nn.Module:
    kept: dict[str, Any] = {name: getattr(layer, name) for name in layer.arguments}
    with torch.no_grad():
        weight, bias = layer.effective_weight().detach(), layer.effective_bias()
    plain = plain_class(layer)
    assert plain is not None
    new = plain(**kept, bias=bias is not None, device="meta")
    # In the memory format it had, channels last perhaps.
    new.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(weight), layer.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), layer.bias_learns())
    return new
