"""What `fixup` and `skipinit` share: the branches that norm layers stand on, and scalars at their ends."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from nfnets.convert.fused import activation_of, after
from nfnets.convert.limits import affine_rms
from nfnets.convert.methods.rows import layer_row, site_row
from nfnets.convert.net import Net
from nfnets.convert.plan import Change, Edit
from nfnets.convert.reference import FACTOR, Reference
from nfnets.convert.stream import stream_targets
from nfnets.errors import UserError
from nfnets.scale.target import Target
from nfnets.skip_layers import with_scalar
from nfnets.structure.readers import scalable
from nfnets.structure.residual import Branch, residual_of
from nfnets.structure.sites import Site
from nfnets.structure.walk import flat_at_zero, is_norm


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
    limits: Mapping[str, float]
    """The largest root mean squares of other layers that norm layers read."""
    head: tuple[str, ...]
    """Classifiers and the like, where no norm layer is left; not among the layers."""
    bounds: Mapping[str, float]
    """Root mean squares that the layers inside branches are not to exceed."""


def branches_of(net: Net, what: str) -> Found | list[Change]:
    """The branches that the sites stand on, or a refusal with its reason for every site."""
    model, graph, sites = net.model, net.graph, net.sites
    read = net.read
    norms = {call for site in sites for call in site.calls}
    try:
        residual = residual_of(model, graph, what)
    except UserError as error:
        return _refused(sites, str(error))
    branches = [b for b in residual.branches if not norms.isdisjoint(b.nodes)]
    if not branches:
        reason = f"no residual branch of {type(model).__name__} has a norm layer: {what} would change nothing there"
        return _refused(sites, f"{reason}; use lsuv")
    for branch in branches:
        if branch.obstacle and not branch.multipliers:
            where = f"{branch.obstacle} (the branch of {branch.path or 'the root'})"
            return _refused(sites, f"{where}: {what}'s scalar has no place; use nf or lsuv")
    inside = {path for b in branches for path in (*b.inner, *b.last)}
    beside = {path for b in residual.branches for path in (*b.inner, *b.last, *b.gates)}
    stream = tuple(path for path in read if path not in inside and path not in beside)
    left = any(is_norm(node) and node.index not in norms for node in graph.nodes)
    constants = {call for site in sites if not scalable(graph, site) for call in site.calls}
    try:
        starts = stream_targets(graph, [b.join for b in branches], stream, net.sizes, what, constants)
    except UserError as error:
        return _refused(sites, str(error))
    return Found(
        tuple(branches),
        frozenset(path for b in branches if not b.multipliers for path in b.ends),
        frozenset({*stream, *inside}),
        stream,
        starts,
        {path: limit for path, limit in net.limits().items() if path not in starts},
        tuple(path for path in residual.head if path not in read and not left),
        _bounds(sites, {p for b in branches for p in b.inner}, net.sizes),
    )


def _bounds(sites: list[Site], inner: set[str], reference: Reference) -> dict[str, float]:
    """How large the layers inside branches may become: as large as what the norm layer that they feed put out, and the
    others as they were. Scaled by their fan out, they let a stream grow that narrows and widens often (GhostNetV3)."""
    limits = {path: rms for path in inner if math.isfinite(rms := reference.rms(path))}
    for site in sites:
        if site.feeder is not None and site.feeder.path in inner:
            limits[site.feeder.path] = affine_rms(site.norm)
    return {path: limit for path, limit in limits.items() if 0 < limit < math.inf}


def refusals(sites: list[Site], find: Callable[[], object]) -> list[Change]:
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


def _refused(sites: Iterable[Site], reason: str) -> list[Change]:
    return [site_row(site, "refuse", "", reason) for site in sites]


def scalars_in_modules(net: Net, found: Found, value: float, rate: float | None = None) -> Iterator[Change]:
    """Changes of modules that end a branch and are no norm layer: they get a scalar of their own.

    Args:
        net: the model.
        found: its branches.
        value: the scalar at first.
        rate: the scalar's learning rate, relative to the others'.
    """
    norms = {site.path for site in net.sites}
    for path in dict.fromkeys(
        p for b in found.branches for p in b.ends if p in found.ends and p not in norms
    ):
        node = net.graph.calls(path)[0]
        edit = Edit(path, partial(_with_scalar, value, rate))
        name = type(node.module).__name__
        yield layer_row(node, "branch end", name, f"times a scalar, {value:g} at first", edit)


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


def scales(net: Net, found: Found) -> Iterator[Change]:
    """How large layers are to be when everything is initialized: those that start a stream, and the heads; those on
    branches only where they outgrow the norm layers that stood on them."""
    yield from net.held()
    for path, rms in found.bounds.items():
        target = Target(rms, "mean square", unless=(0.0, FACTOR), search=True)
        yield Change(path, action="scale", target=target, why="no larger than its norm layer made it")
    for path in found.stream:
        target = Target(found.starts.get(path, 1.0), "variance", at_most=found.limits.get(path, math.inf))
        yield Change(path, action="scale", target=target, why="starts a trunk")
