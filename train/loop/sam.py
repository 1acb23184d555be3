"""Sharpness-aware minimization: the gradient is taken where the loss is worst nearby."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def climbed(model: nn.Module, rho: float) -> Iterator[None]:
    """Inside, the weights are one ascent away, w + ρ · g / ‖g‖, and gradients are cleared; afterwards w again.

    g is the gradient that the parameters hold on entry, ‖g‖ its norm over all of them. A loss scale does not change
    the direction. Where g is not finite nothing moves: a gradient scaler sees the second gradient overflow, too.
    Buffers (BatchNorm's statistics) are restored: they belong to w.

    Args:
        model: after a backward pass.
        rho: ρ, the length of the ascent; the NFNet paper fine-tunes with 0.05.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> layer(torch.tensor([[3.0]])).backward()
        >>> with climbed(layer, rho=0.5):
        ...     inside = layer.weight.item()
        >>> inside, layer.weight.item()
        (1.5, 1.0)

    Paper: arXiv 2010.01412. Official code: google-research/sam.
    """
    moved = [p for p in model.parameters() if p.grad is not None]
    buffers = list(model.buffers())
    with torch.no_grad():
        gradients = [p.grad for p in moved if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        factor = torch.where(norm.isfinite(), rho / (norm + 1e-12), 0.0)
        # Copies, not a subtraction afterwards: w + e − e is not w.
        kept = [t.detach().clone() for t in (*moved, *buffers)]
        for p, gradient in zip(moved, gradients, strict=True):
            p.add_(gradient.nan_to_num(0.0, 0.0, 0.0) * factor)
            p.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip((*moved, *buffers), kept, strict=True):
                tensor.copy_(value)
