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

_TOGETHER = (
    2**20
)  # weights in one backward pass: more save no time, and their gradients are there all at once


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Compute the effective weights of a model once for all passes inside: micro-batches, recomputed activations.

    ∂L/∂W = Jᵀ Σ_k ∂L_k/∂Ŵ with J = ∂Ŵ/∂W: gradients by Ŵ are added up, and go on to the parameters when the block is
    left, in one backward pass for all of them. They are what they are without the block, but for rounding.

    Until then a layer's weight, gain and bias have no gradient of these passes, so clip and step after the block, and
    do not ask `torch.autograd.grad` for them inside. Left with an error, nothing reaches them. Layers whose weights are
    parametrized, sharded, on a GPU or in shared memory, where a change could go unseen, compute as they do outside; so
    do all of them in a job of `torch.distributed`, and what `torch.compile` runs.

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
    # DDP's hooks count the gradients of every backward pass.
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    held = [] if several or torch.is_inference_mode_enabled() else list(_held(model))
    try:
        yield
    finally:
        for each in held:
            if each.layer._remembered is each.remembered:
                each.layer._remembered = None
    while held:
        batch = [held.pop()]
        while held and _size(batch) < _TOGETHER:
            batch.append(held.pop())
        _hand_on(batch)


class _Held(NamedTuple):
    layer: Computed
    remembered: Remembered  # leaves of the graph, which gather gradients
    outputs: tuple[Tensor, Tensor | None]  # the same with their history


def _held(model: nn.Module) -> Iterator[_Held]:
    """Compute, and have the layers take it from now on."""
    layers = [m for m in model.modules() if isinstance(m, Computed) and not m.remembers_for_steps()]
    # All before the first is computed: a graph holds on to a weight, of which layers that share it could not tell more.
    for layer, snapshot in [(layer, layer.snapshot()) for layer in layers]:
        if snapshot is not None:
            with torch.enable_grad():
                outputs = layer.computed()
            weight, bias = (t if t is None else t.detach().requires_grad_(t.requires_grad) for t in outputs)
            assert weight is not None
            yield _Held(layer, layer.remember(snapshot, weight, bias, for_steps=True), outputs)


def _size(batch: list[_Held]) -> int:
    return sum(each.outputs[0].numel() for each in batch)


def _hand_on(batch: list[_Held]) -> None:
    """Gradients of what was computed, to what it was computed from."""
    outputs: list[Tensor] = []
    grads: list[Tensor] = []
    for layer, remembered, pair in batch:
        leaves = (remembered.weight, remembered.bias)
        used = [
            (out, leaf.grad.detach())
            for out, leaf in zip(pair, leaves, strict=True)
            if out is not None and leaf is not None and leaf.grad is not None
        ]
        if used and not remembered.holds(layer):
            raise UserError(
                f"a weight of {type(layer).__name__} was changed inside accumulating: expected the same for all "
                "passes; step the optimizer after the block"
            )
        outputs += [out for out, _ in used]
        grads += [grad for _, grad in used]
    batch.clear()  # what tells of changes, too: an optimizer would copy what it writes to
    if outputs:
        torch.autograd.backward(outputs, grads)
