"""What follows exactly from statistics already taken, and so needs no read of memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nfnets.signal.moments import Moments
from nfnets.signal.summary import CONSTANT, Parts, Raw
from nfnets.trace import Node

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Derived(NamedTuple):
    """Which of a call's statistics follow from those of its input."""

    moments: bool
    extremes: bool


NOTHING = Derived(False, False)


def derivable(node: Node, output: Tensor, channels: int, channelwise: bool) -> Derived:
    """Which of a call's statistics `derive` can give, so that they need not be measured.

    Args:
        node: the call; its one input has the same channels and type, and statistics.
        output: what it returned.
        channels: how many there are.
        channelwise: whether the extremes of its input are known channel by channel.

    Returns:
        The smallest and largest value after a ReLU, both and the moments after a BatchNorm that used batch statistics.
        Only where that is an identity: torch's own layers, nobody's hook on them, no rounding to half precision.
    """
    # On a CPU a read is what costs; elsewhere the launches of a few small kernels cost more than a read.
    if output.device.type != "cpu" or output.dtype.itemsize < 4:
        return NOTHING
    norm = node.module
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and type(norm) in _NORMS and _plain(norm):
        batch = (norm.training or norm.running_mean is None) and channels == norm.num_features
        return Derived(batch, batch and channelwise)
    rectifies = node.name == "relu" if norm is None else type(norm) is nn.ReLU and _plain(norm)
    return Derived(False, rectifies)


def derive(node: Node, known: Parts, before: Raw) -> Raw:
    """All statistics of a call, from those that were measured and those of its input.

    Args:
        node: the call.
        known: what `derivable` did not promise.
        before: the statistics of its input.

    Returns:
        What `measure` would have given.
    """
    moments, extremes, similarity = known
    norm = node.module
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        moments, found = _normalized(norm, before, extremes is None)
    else:
        found = before.low.clamp(min=0), before.high.clamp(min=0)
    low, high = extremes or found
    assert moments is not None
    return Raw(moments, low, high, *similarity)


def _normalized(
    norm: nn.modules.batchnorm._BatchNorm, before: Raw, extremes: bool
) -> tuple[Moments, tuple[Tensor, Tensor]]:
    """After a BatchNorm that used batch statistics, from what was before it.

        y_c = (x_c − mean_c) · weight_c / √(var_c + eps) + bias_c

    In numpy, which takes a fraction of what torch does for vectors of a few hundred numbers.
    """
    m = before.moments
    mean, m2 = m.mean.numpy(), m.m2.numpy()
    scale, shift = 1.0, 0.0
    if norm.affine:
        scale, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    with np.errstate(all="ignore"):  # what is not finite stays so
        constant = m2 <= CONSTANT * m.count * np.square(mean)  # rounding only
        scale = np.where(constant, 0.0 * m2, scale / np.sqrt(m2 / m.count + norm.eps))
        moments = Moments(m.count, _tensor(0.0 * mean + shift, m.mean), _tensor(m2 * scale**2, m.mean))
        if not extremes:
            return moments, (before.low, before.high)
        one, other = ((end.numpy() - mean) * scale + shift for end in (before.low, before.high))
        low, high = np.minimum(one, other), np.maximum(one, other)
    return moments, (_tensor(low, before.low), _tensor(high, before.low))


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.dtype)


def _plain(module: nn.Module | None) -> bool:
    """Whether the tracer's own hooks are the only ones: others could have changed what goes in or comes out."""
    if module is None or "forward" in module.__dict__:
        return False
    return len(module._forward_hooks) == 1 and len(module._forward_pre_hooks) == 1
