"""How large things may become without norm layers, by what they were with them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from nfnets.convert.fused import held_at
from nfnets.convert.reference import FACTOR, Reference
from nfnets.structure.readers import summed_layers
from nfnets.structure.sites import Site
from nfnets.trace import Graph


def largest(
    graph: Graph, sites: list[Site], reference: Reference, scales: Mapping[int, float] | None = None
) -> dict[str, float]:
    """Largest root mean squares, by path, of what stands in norm layers' places: `FACTOR` times the BatchNorm model's.

    Of a norm layer's that is √mean(γ² + β²), unless both are 0: RepVGG's start near 0.1. `scales` above 1 lift it. Of
    layers that norm layers read through sums only it is their own.
    """
    found = {node.path: FACTOR * reference.rms(node.path) for node in summed_layers(graph, sites)}
    for site in sites:
        lift = max([1.0, *((scales or {}).get(call, 1.0) for call in site.calls)])
        limit = FACTOR * affine_rms(site.norm) * lift
        place = held_at(site.path, site.norm)
        for path in [place] if site.feeder is None else [place, site.feeder.path]:
            found[path] = min(limit, found.get(path, math.inf))
    return found


def lifted(
    graph: Graph, sites: list[Site], reference: Reference, scales: Mapping[int, float]
) -> dict[int, float]:
    """`branch_scales` and, of other layers that norm layers read through sums only, 1 / `FACTOR` of their root mean
    square where that is above 1: a stream that no norm layer starts is as large as what came before it."""
    starts = {}
    for node in summed_layers(graph, sites):
        least = reference.rms(node.path) / FACTOR
        if node.index not in scales and 1 < least < math.inf:
            starts[node.index] = least
    return {**scales, **starts}


def affine_rms(norm: nn.Module) -> float:
    """√mean(γ² + β²), what a norm layer puts out; 1 without γ and β, infinite where both are 0."""
    pair = (getattr(norm, "weight", None), getattr(norm, "bias", None))
    given = [t.detach().float() for t in pair if isinstance(t, Tensor) and not t.is_meta]
    square = sum(float(t.square().mean()) for t in given)
    return math.sqrt(square) or (math.inf if given else 1.0)
