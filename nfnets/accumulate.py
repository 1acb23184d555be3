"""Several forward and backward passes with the same weights: what is computed from them is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nfnets.computed import Computed, Remembered
from nfnets.errors import UserError
from nfnets.given import check_module

_TOGETHER = 2**20  # weights in one node of the graph: more save no time, and their gradients are there all at once


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Compute the effective weights of a model once for all passes inside: micro-batches, recomputed activations.

    ∂L/∂W = Jᵀ Σ_k ∂L_k/∂Ŵ with J = ∂Ŵ/∂W: gradients by Ŵ are added up, and go on to the parameters when the block is
    left, in one backward pass for all of them. They are what they are without the block, but for rounding.

    Until then a layer's weight, gain and bias have no gradient of these passes, so clip and step after the block, and
    do not ask `torch.autograd.grad` for them inside. Left with an error, nothing reaches them. Layers whose weights are
    parametrized, sharded, on a GPU or in shared memory, where a change could go unseen, compute as they do outside;
    and so does what `torch.compile` runs.

    Args:
        model: with scaled-standardized or tuned layers; anything else in it is left alone.

    Raises:
        UserError: no module; when left, a weight was changed inside.

    Example:
        >>> from nfnets import layers
        >>> net = nn.Sequential(nn.Flatten(), layers.ScaledStdLinear(12, 2))
        >>> with accumulating(net):
        ...     for images in torch.randn(4, 8, 3, 2, 2):
        ...         net(images).square().mean().backward()
        >>> net[1].weight.grad.shape
        torch.Size([2, 12])
    """
    check_module(model)
    batches = [] if torch.is_inference_mode_enabled() else [_hold(layers) for layers in _batches(model)]
    try:
        yield
    finally:
        for held in (each for batch in batches for each in batch):
            if held.layer._remembered is held.remembered:
                held.layer._remembered = None
    while batches:
        _hand_on(batches.pop())


class _Held(NamedTuple):
    layer: Computed
    remembered: Remembered  # leaves of the graph, which gather gradients
    outputs: tuple[Tensor, Tensor | None]  # the same with their history


def _batches(model: nn.Module) -> Iterator[list[Computed]]:
    """Layers that compute their weights in one go."""
    batch: list[Computed] = []
    for layer in model.modules():
        if isinstance(layer, Computed) and layer._remembered_for_steps() is None and layer.can_remember():
            size = sum(each.weight.numel() for each in (*batch, layer))
            if batch and (_kind(batch[0]) != _kind(layer) or size > _TOGETHER):
                yield batch
                batch = []
            batch.append(layer)
    if batch:
        yield batch


def _kind(layer: Computed) -> tuple[object, bool]:
    return type(layer).together, _learns(layer)


def _learns(layer: Computed) -> bool:
    return any(t is not None and t.requires_grad for t in layer.made_of() or ())


@torch.enable_grad()
def _hold(layers: list[Computed]) -> list[_Held]:
    """Compute, and have the layers take it from now on."""
    found = []
    for layer, (weight, bias) in zip(layers, type(layers[0]).together(layers), strict=True):
        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in (weight, bias)]
        if (remembered := layer.remember(*leaves)) is not None:
            found.append(_Held(layer, remembered, (weight, bias)))
    return found


def _hand_on(batch: list[_Held]) -> None:
    """Gradients of what was computed, to what it was computed from."""
    outputs: list[Tensor] = []
    grads: list[Tensor] = []
    for layer, remembered, pair in batch:
        used = [(out, leaf.grad) for out, leaf in zip(pair, remembered[2:4], strict=True) if leaf is not None]
        used = [(out, grad) for out, grad in used if grad is not None]
        if used and not remembered.holds(layer):
            raise UserError(
                f"a weight of {type(layer).__name__} was changed inside accumulating: expected the same weights for all "
                "passes; step the optimizer after the block"
            )
        outputs += [out for out, _ in used]  # type: ignore[misc]
        grads += [grad.detach() for _, grad in used]
    batch.clear()  # what tells of changes, too: an optimizer would copy what it writes to
    if outputs:
        torch.autograd.backward(outputs, grads)
