"""Whether a norm layer of somebody else's class normalizes, and does nothing besides."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.convert.fused import after
from nfnets.convert.methods.parts import channels_of
from nfnets.copying import deep_copy
from nfnets.structure.laws import holds, random_twin
from nfnets.structure.sites import Site
from nfnets.trace import Graph
from nfnets.whose import runs_torchs_code

_NO_CALL = ((2, 2), (2,), (), (2, 2, 2))
"""Shapes behind the channels to try for a layer that the forward pass never runs."""
_NEXT_TO_NOTHING = 1e-12
"""A variance beside which ε is all there is."""


def more_than_normalizes(graph: Graph, site: Site) -> str:
    """What a norm layer does that would be lost with it; empty if it is batch normalization over dimension 1 with its
    own statistics, γ, β and ε, then the dropout and activation known to be fused into it (`drop`, `act`); of another
    kind, if its law is known (`nfnets.structure.laws`).

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
    if site.kind != "batch":
        return "" if site.law is not None else f"{name}.forward does more than {site.kind} normalization"
    if is_torchs(site.norm):
        return ""
    missing = [n for n in ("running_mean", "running_var") if not hasattr(site.norm, n)]
    if missing:
        return f"{name} has no {' and no '.join(missing)}: what it computes cannot be told"
    if any(_normalizes(site.norm, shape) for shape in _shapes(graph, site)):
        return ""
    return f"{name}.forward does more than batch normalization, which would be lost"


def is_frozen(graph: Graph, site: Site) -> bool:
    """Whether a norm layer couples no samples, in training either: one that only ever applies what it holds.

    Torch's own are not. Of another a random copy runs in training mode: what it makes of a sample must not depend on
    the others, and its buffers must stay. A forward of the instance itself may run the original: nothing shows there.

    Example:
        >>> from nfnets.structure.sites import find_sites
        >>> from nfnets.trace import trace
        >>> from torchvision.ops import FrozenBatchNorm2d
        >>> for norm in (nn.BatchNorm2d(4).eval(), FrozenBatchNorm2d(4)):
        ...     model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
        ...     graph = trace(model, torch.randn(2, 3, 8, 8))
        ...     is_frozen(graph, *find_sites(model, graph))
        False
        True
    """
    if site.kind != "batch" or is_torchs(site.norm) or "forward" in vars(site.norm):
        return False
    return any(_ignores(site.norm, shape) for shape in _shapes(graph, site))


def eps_of(norm: nn.Module) -> float:
    """A norm layer's ε: of torch's own as they say, of another as a copy of it computes.

    At γ = 1, β = 0 and μ = 0 it puts out y = x / √(σ² + ε), so that ε = (x / y)² − σ², of which next to nothing is σ².

    Example:
        >>> class Hidden(nn.BatchNorm2d):
        ...     def forward(self, input):
        ...         return F.batch_norm(input, self.running_mean, self.running_var, eps=0.001)
        >>> eps_of(nn.BatchNorm2d(4)), eps_of(Hidden(4))
        (1e-05, 0.001)
    """
    says = getattr(norm, "eps", None)
    if is_torchs(norm) or norm.running_mean is None:
        return float(says)  # type: ignore[arg-type]
    found = next((eps for shape in _space(norm) if (eps := _solved(norm, shape)) is not None), None)
    if found is None or (isinstance(says, float) and math.isclose(found, says, rel_tol=1e-4)):
        return float(says)  # type: ignore[arg-type]
    return found


def statistics_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The mean and variance that a norm layer applies in evaluation mode.

    Split batch norms hold a set for every split, and make them one when they are switched to evaluation.
    """
    at: Any = norm if is_torchs(norm) else deep_copy(norm).eval()
    channels = channels_of(norm)
    return at.running_mean[:channels], at.running_var[:channels]


def is_torchs(module: nn.Module) -> bool:
    """Whether a module's forward is one of torch's own batch or instance norm layers'."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and runs_torchs_code(module)


def _shapes(graph: Graph, site: Site) -> Iterable[tuple[int, ...]]:
    """What a call reads, but small and of few samples."""
    for call in site.calls[:1]:
        node = graph.nodes[call]
        shape = graph.nodes[node.inputs[0]].shape if node.inputs else node.shape
        return [(3, *shape[1:2], *(min(n, 2) for n in shape[2:]))]
    return _space(site.norm)


def _space(norm: nn.Module) -> list[tuple[int, ...]]:
    return [(3, channels_of(norm), *space) for space in _NO_CALL]


def _normalizes(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    eps = getattr(norm, "eps", None) if norm.running_mean is None else _solved(norm, shape)
    if eps is None:
        return False

    def same(variance: float) -> bool:
        twin, x = random_twin(norm, shape, variance)
        found = twin(x.clone())
        mean = var = None
        if twin.running_mean is not None:  # the first set, of a split batch norm's
            mean, var = twin.running_mean[: shape[1]], twin.running_var[: shape[1]]
        affine = (getattr(twin, "weight", None), getattr(twin, "bias", None))
        expected = after(twin)(F.batch_norm(x, mean, var, *affine, training=mean is None, eps=eps))
        scale = variance**-0.5
        return found.shape == expected.shape and torch.allclose(found, expected, 1e-3, 1e-3 * scale)

    # Of statistics as small as ε too, for it is not known where ε is added.
    return holds(lambda: same(1.0) and same(max(eps, 1e-6)))


def _ignores(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    def same() -> bool:
        twin, x = random_twin(norm, shape, 1.0)
        twin.train()
        if isinstance(getattr(twin, "drop", None), nn.Module):
            twin.drop.eval()
        others = torch.cat([x[:1], x[1:] * 2 + 1])
        before = [buffer.clone() for buffer in twin.buffers()]
        alone = torch.equal(twin(x.clone())[0], twin(others)[0])
        return alone and all(map(torch.equal, before, twin.buffers()))

    return holds(same)


def _solved(norm: nn.Module, shape: tuple[int, ...]) -> float | None:
    found = []

    def solve() -> bool:
        twin, _ = random_twin(norm, shape, 1.0)
        twin.double()
        for name, value in (
            ("running_mean", 0),
            ("running_var", _NEXT_TO_NOTHING),
            ("weight", 1),
            ("bias", 0),
        ):
            if isinstance(getattr(twin, name, None), Tensor):
                getattr(twin, name).fill_(value)
        for name in ("drop", "act"):
            if isinstance(getattr(twin, name, None), nn.Module):
                setattr(twin, name, nn.Identity())
        ratio = 1 / twin(torch.ones(shape, dtype=torch.float64, device="cpu"))
        found.append(float(f"{float(ratio.square().mean()) - _NEXT_TO_NOTHING:.5g}"))
        return math.isfinite(found[0]) and found[0] > -_NEXT_TO_NOTHING

    return max(found[0], 0.0) if holds(solve) else None
