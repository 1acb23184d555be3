"""What follows exactly from statistics already taken, and so needs no read of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nfnets.signal.moments import Lent, Moments
from nfnets.signal.summary import CONSTANT, Parts, Raw
from nfnets.trace import Node

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Derived(NamedTuple):
    """Which of a call's statistics follow from those of its input."""

    moments: bool
    extremes: bool


NOTHING = Derived(False, False)


def derivable(node: Node, output: Tensor, channels: int, channelwise: bool) -> Derived:
    """Which of a call's statistics `derived` can give, so that they need not be measured.

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


def derived(pending: Mapping[int, tuple[Node, Parts]], known: Mapping[int, Raw]) -> dict[int, Raw]:
    """All statistics of calls, from those that were measured and those of their inputs.

    Args:
        pending: the calls by node, in execution order, with what `derivable` did not promise.
        known: statistics of other nodes.

    Returns:
        What `measure` would have given, by node.
    """
    norms = [i for i, (node, _) in pending.items() if isinstance(node.module, _NORMS)]
    # Together: each by itself would take a dozen operations on a few hundred numbers.
    direct = {i: known[before] for i in norms if (before := pending[i][0].inputs[0]) in known}
    found = _normalized({i: (pending[i][0].module, raw, pending[i][1]) for i, raw in direct.items()})
    for index, (node, (moments, extremes, similarity)) in pending.items():
        if index in found:
            continue
        source = node.inputs[0]
        before = known[source] if source in known else found[source]
        if isinstance(node.module, _NORMS):
            found |= _normalized({index: (node.module, before, pending[index][1])})
            continue
        assert moments is not None
        moments = moments.settled() if isinstance(moments, Lent) else moments
        low, high = extremes or (before.low.clamp(min=0), before.high.clamp(min=0))
        found[index] = Raw(moments, low, high, *similarity)
    return found


def _normalized(calls: Mapping[int, tuple[Any, Raw, Parts]]) -> dict[int, Raw]:
    """After BatchNorms that used batch statistics, from what was before them, by node.

        y_c = (x_c − mean_c) · weight_c / √(var_c + eps) + bias_c

    In numpy, which takes a fraction of what torch does for vectors of a few thousand numbers.
    """
    if not calls:
        return {}
    norms, before = [norm for norm, _, _ in calls.values()], [raw for _, raw, _ in calls.values()]
    sizes = [norm.num_features for norm in norms]
    starts = np.cumsum([0, *sizes])
    counts = np.repeat([raw.moments.count for raw in before], sizes)
    mean, m2 = (_row([getattr(raw.moments, name) for raw in before]) for name in ("mean", "m2"))
    scale, shift = (
        _row(
            [
                torch.full((size,), value) if p is None else p.detach()
                for p, size in zip(each, sizes, strict=True)
            ]
        )
        for value, each in ((1.0, [n.weight for n in norms]), (0.0, [n.bias for n in norms]))
    )
    # Where the extremes of the input are not known by channels, those of the output were measured.
    low, high = (
        _row([e.expand(size) for e, size in zip(each, sizes, strict=True)]) for each in _ends(before)
    )
    with np.errstate(all="ignore"):  # what is not finite stays so
        constant = m2 <= CONSTANT * counts * np.square(mean)  # rounding only
        eps = np.repeat([norm.eps for norm in norms], sizes)
        scale = np.where(constant, 0.0 * m2, scale / np.sqrt(m2 / counts + eps))
        one, other = (low - mean) * scale + shift, (high - mean) * scale + shift
        mean, m2 = 0.0 * mean + shift, m2 * scale**2
        low = np.minimum.reduceat(np.minimum(one, other), starts[:-1])
        high = np.maximum.reduceat(np.maximum(one, other), starts[:-1])
    found = {}
    for k, (index, (_, raw, (_, extremes, similarity))) in enumerate(calls.items()):
        part = slice(starts[k], starts[k + 1])
        moved = (torch.from_numpy(values[part]).to(raw.moments.mean.dtype) for values in (mean, m2))
        ends = extremes or (raw.low.new_tensor(low[k]), raw.low.new_tensor(high[k]))
        found[index] = Raw(Moments(raw.moments.count, *moved), *ends, *similarity)
    return found


def _ends(raws: Sequence[Raw]) -> tuple[list[Tensor], list[Tensor]]:
    return [raw.low for raw in raws], [raw.high for raw in raws]


def _row(vectors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([vector.numpy() for vector in vectors])


def _plain(module: nn.Module | None) -> bool:
    """Whether the tracer's own hooks are the only ones: others could have changed what goes in or comes out."""
    if module is None or "forward" in module.__dict__:
        return False
    return len(module._forward_hooks) == 1 and len(module._forward_pre_hooks) == 1
