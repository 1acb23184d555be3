"""What `fixup` and `skipinit` share: the branches that norm layers stand on, and scalars at their ends."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from nfnets.convert.calibrate import Constants, beside, calibrate_
from nfnets.convert.methods.parts import (
    affine_rms,
    after,
    largest,
    layer_row,
    read_by_norms,
    scalable,
    site_row,
)
from nfnets.convert.plan import Edit, Row
from nfnets.convert.reference import AtMost, Reference, is_norm, kept
from nfnets.convert.stream import stream_targets
from nfnets.errors import UserError
from nfnets.init import lsuv_
from nfnets.init.skip_layers import with_scalar
from nfnets.structure.ends import flat_at_zero
from nfnets.structure.residual import Branch, residual_of
from nfnets.structure.sites import Site, activation_of
from nfnets.trace import Graph


@dataclass(frozen=True)
class Found:
    """The residual branches of a model on which norm layers stand, and the layers to set."""

    branches: tuple[Branch, ...]
    ends: frozenset[str]
    """Modules that end these branches."""
    layers: frozenset[str]
    """Weight layers that norm layers read, and those beside them on a branch."""
    stream: tuple[str, ...]
    """Of these the ones on no branch: what makes the stream."""
    starts: Mapping[str, float]
    """Standard deviations of those that are to have another than 1."""
    most: Mapping[str, float]
    """The largest root mean squares of other layers that norm layers read."""
    head: tuple[str, ...]
    """Classifiers and the like, where no norm layer is left; not among the layers."""
    kept: Mapping[str, float | None]
    """What `keep_scales` is to keep."""


def branches_of(
    model: nn.Module, graph: Graph, sites: list[Site], reference: Reference, what: str
) -> Found | list[Row]:
    """The branches that the sites stand on, or a refusal with its reason for every site."""
    read = read_by_norms(graph, sites)
    norms = {call for site in sites for call in site.calls}
    try:
        net = residual_of(model, graph, what)
    except UserError as error:
        return _refused(sites, str(error))
    branches = [b for b in net.branches if not norms.isdisjoint(b.nodes)]
    if not branches:
        reason = f"no residual branch of {type(model).__name__} has a norm layer: {what} would change nothing there"
        return _refused(sites, f"{reason}; use lsuv")
    for branch in branches:
        if branch.obstacle and not branch.multipliers:
            where = f"{branch.obstacle} (the branch of {branch.path or 'the root'})"
            return _refused(sites, f"{where}: {what}'s scalar has no place; use nf or lsuv")
    inside = {path for b in branches for path in (*b.inner, *b.last)}
    beside = {path for b in net.branches for path in (*b.inner, *b.last, *b.gates)}
    stream = tuple(path for path in read if path not in inside and path not in beside)
    left = any(is_norm(node) and node.index not in norms for node in graph.nodes)
    constants = {call for site in sites if not scalable(graph, site) for call in site.calls}
    try:
        starts = stream_targets(graph, [b.join for b in branches], stream, reference, what, constants)
    except UserError as error:
        return _refused(sites, str(error))
    return Found(
        tuple(branches),
        frozenset(path for b in branches if not b.multipliers for path in b.ends),
        frozenset({*stream, *inside}),
        stream,
        starts,
        {path: limit for path, limit in largest(graph, sites, reference).items() if path not in starts},
        tuple(path for path in net.head if path not in read and not left),
        kept(graph, reference) | _bounds(sites, {p for b in branches for p in b.inner}, reference),
    )


def _bounds(sites: list[Site], inner: set[str], reference: Reference) -> dict[str, float | None]:
    """How large the layers inside branches may become: as large as what the norm layer that they feed put out, and the
    others as they were. Scaled by their fan out, they let a stream grow that narrows and widens often (GhostNetV3)."""
    limits = {path: rms for path in inner if math.isfinite(rms := reference.rms(path))}
    for site in sites:
        if site.feeder is not None and site.feeder.path in inner:
            limits[site.feeder.path] = affine_rms(site.norm)
    return {path: AtMost(limit**2) for path, limit in limits.items() if math.isfinite(limit)}


def refusals(sites: list[Site], find: Callable[[], object]) -> list[Row]:
    """A refusal for every site if what is to be set cannot be, else nothing.

    Args:
        sites: the norm layers.
        find: raises a `UserError` then.
    """
    try:
        find()
    except UserError as error:
        return _refused(sites, str(error))
    return []


def _refused(sites: Iterable[Site], reason: str) -> list[Row]:
    return [site_row(site, "refuse", "", reason) for site in sites]


def scalars_in_modules(
    graph: Graph, sites: list[Site], found: Found, value: float, rate: float | None = None
) -> list[Row]:
    """Rows for modules that end a branch and are no norm layer: they get a scalar of their own.

    Args:
        graph: of the model with its norm layers.
        sites: the norm layers.
        found: the model's branches.
        value: the scalar at first.
        rate: the scalar's learning rate, relative to the others'.
    """
    norms = {site.path for site in sites}
    rows = []
    for path in dict.fromkeys(
        p for b in found.branches for p in b.ends if p in found.ends and p not in norms
    ):
        node = graph.calls(path)[0]
        edit = Edit(path, partial(_with_scalar, value, rate))
        name = type(node.module).__name__
        rows.append(layer_row(node, "branch end", name, f"times a scalar, {value:g} at first", edit))
    return rows


def _with_scalar(value: float, rate: float | None, module: nn.Module) -> nn.Module:
    new = with_scalar(module, value)
    if rate is not None:
        new.__dict__["lr_scale"] = rate  # `nfnets.param_groups` reads it
    return new


def ending(norm: nn.Module, scalar: nn.Module, bias: nn.Module | None = None) -> nn.Module:
    """What stands in place of a norm layer that ends a branch: the scalar, behind a fused activation that would not
    let anything through at 0."""
    if flat_at_zero(activation_of(norm)):
        return nn.Sequential(OrderedDict(norm=after(norm, bias), scalar=scalar)).train(norm.training)
    return after(norm, scalar if bias is None else nn.Sequential(OrderedDict(scalar=scalar, bias=bias)))


def settle_scales_(model: nn.Module, inputs: tuple[Any, ...], found: Found) -> None:
    """Scale the layers that start a stream, in one forward pass, and the heads; the branches, where they outgrow
    the norm layers that stood on them."""
    if found.stream:
        lsuv_(
            model,
            *inputs,
            orthonormal=False,
            strict=False,
            layers=found.stream,
            targets=found.starts,
            most=found.most,
            beside=beside(found.kept, constants := Constants(most=found.most)),
        )
        constants.write()
    else:
        calibrate_(model, *inputs, most=found.most, keep=found.kept)
