"""Whether a norm layer of somebody else's class normalizes, and does nothing besides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.convert.fused import after
from nfnets.copying import deep_copy
from nfnets.structure.sites import Site
from nfnets.trace import Graph

_NO_CALL = ((2, 2), (2,), (), (2, 2, 2))
"""Shapes behind the channels to try for a layer that the forward pass never runs."""


def more_than_normalizes(graph: Graph, site: Site) -> str:
    """What a norm layer does that would be lost with it; empty if it is batch normalization over dimension 1 with its
    own statistics, γ, β and ε, then the dropout and activation known to be fused into it (`drop`, `act`).

    Torch's own layers are. One with a forward of its own is tried: a copy of it gets random parameters and statistics
    and runs on a small random input in evaluation mode. What the values are in the model does not count, for they will
    be others; nothing is read from them, and the answer is the same on `meta`.

    Args:
        graph: of the model.
        site: one of its norm layers.

    Example:
        >>> from nfnets.structure.sites import find_sites
        >>> from nfnets.trace import trace
        >>> class Rectified(nn.BatchNorm2d):
        ...     def forward(self, input):
        ...         return super().forward(input).relu()
        >>> for norm in (nn.BatchNorm2d(4), Rectified(4)):
        ...     model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
        ...     graph = trace(model, torch.randn(2, 3, 8, 8))
        ...     more_than_normalizes(graph, *find_sites(model, graph))
        ''
        'Rectified.forward does more than batch normalization, which would be lost'
    """
    most = max((graph.nodes[call].arguments for call in site.calls), default=1)
    name = type(site.norm).__name__
    if most > 1:
        return f"it is called with {most} arguments, of which a replacement would read one"
    if is_torchs(site.norm):
        return ""
    missing = [n for n in ("running_mean", "running_var", "eps") if not hasattr(site.norm, n)]
    if missing:
        return f"{name} has no {' and no '.join(missing)}: what it computes cannot be told"
    if any(_normalizes(site.norm, shape) for shape in _shapes(graph, site)):
        return ""
    return f"{name}.forward does more than batch normalization, which would be lost"


def is_torchs(module: nn.Module) -> bool:
    """Whether a module's forward is one of torch's own batch norm layers'."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        "forward" not in vars(module) and type(module).forward.__module__.startswith("torch.nn.modules.")
    )


def _shapes(graph: Graph, site: Site) -> Iterable[tuple[int, ...]]:
    """What a call reads, but small and of few samples."""
    for call in site.calls[:1]:
        node = graph.nodes[call]
        shape = graph.nodes[node.inputs[0]].shape if node.inputs else node.shape
        return [(3, *shape[1:2], *(min(n, 2) for n in shape[2:]))]
    return [(3, _channels(site.norm), *space) for space in _NO_CALL]


def _channels(norm: Any) -> int:
    return norm.num_features if norm.running_mean is None else len(norm.running_mean)


def _normalizes(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cpu")
    try:
        twin: Any = deep_copy(norm).to_empty(device="cpu").float().eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for tensor in _floats(twin):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu"))
            if twin.running_var is not None:
                twin.running_var.abs_().add_(0.5)
            for module in twin.modules():  # the user's hooks are not to see these values
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
            found = twin(x.clone())
            statistics = (twin.running_mean, twin.running_var)
            affine = (getattr(twin, "weight", None), getattr(twin, "bias", None))
            plain = F.batch_norm(x, *statistics, *affine, training=twin.running_mean is None, eps=twin.eps)
            expected = after(twin)(plain)
    except Exception:  # it wants more than a tensor of this shape: whatever it does, it is not this
        return False
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, 1e-3, 1e-3)
    )


def _floats(module: nn.Module) -> Iterator[Tensor]:
    return (t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())
