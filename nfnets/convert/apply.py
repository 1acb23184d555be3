"""`plan` and `convert`: one pass to see, one copy to change, all or nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nfnets.advice import MANY, conversion_options, images, whole
from nfnets.convert.copies import check_copy, own_copy, watched
from nfnets.convert.edits import apply_edits, take_back
from nfnets.convert.example import Example, completed, example, fullest_graph, in_mode
from nfnets.convert.holders import Undo
from nfnets.convert.kinds import asked, attention_reads, nothing_found, reason_of_kind, unknown_rows
from nfnets.convert.methods.base import Method, find_method, of_type
from nfnets.convert.methods.parts import on_meta
from nfnets.convert.methods.rows import site_row
from nfnets.convert.net import Net
from nfnets.convert.own_norm import is_frozen
from nfnets.convert.plan import Change, Plan, Start
from nfnets.convert.reference import Reference
from nfnets.convert.refuse import check_example, check_model, check_whole, function_rows, reason_against
from nfnets.convert.select import Patterns, reasons_left
from nfnets.errors import ForwardError, UserError, unknown
from nfnets.given import counted
from nfnets.graph import Graph
from nfnets.layers import _ScaledStd
from nfnets.marked import NAME, Mark, measured_constant
from nfnets.nested import tensors_in
from nfnets.scale.engine import set_scales
from nfnets.scale.knob import constant
from nfnets.scale.one_pass import transaction
from nfnets.structure.norms import norm_layers
from nfnets.structure.sites import Site, find_sites

_log = logging.getLogger("nfnets")
_CALLER = 3
"""Frames from `convert` to who called it: a decorator stands between."""
_FROZEN = "frozen: it couples no samples; name it in include= to replace it"
_ATTENTION = "attention's products read it: it bounds their logits; name it in include= to replace it"
_UNREACHED = "the forward pass on these inputs never runs it: nothing can be measured there"


class ConversionError(UserError):
    """Something cannot be converted; carries the whole plan."""

    def __init__(self, message: str, plan: Plan):
        super().__init__(message)
        self.plan = plan


def plan(
    model: nn.Module,
    *inputs: Any,
    method: str = "nf",
    norms: str | Sequence[str] = "batch",
    kwargs: Mapping[str, Any] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    batch_size: int | None = None,
    **options: Any,
) -> Plan:
    """What `convert` would do to every norm layer, and why; the model is not touched.

    Args:
        model: any model whose forward runs.
        *inputs: example inputs; `meta` tensors do for a model on `meta`.
        method: name of a conversion method.
        norms: which norm layers: `"batch"`; `"all"`; or kinds, of `"batch"`, `"group"`, `"instance"`, `"layer"` and
            `"rms"`. A method carries some kinds (`Method.carries`); of "all" it refuses the others.
        kwargs: example inputs that the forward takes by keyword.
        include: shell patterns (`"layer4*"`) of paths; only norm layers at or below one of them are replaced, frozen
            ones too, which methods other than `fold` leave otherwise.
        exclude: patterns of paths; norm layers at or below one of them are left.
        batch_size: images per training step, as for `convert`.
        **options: the method's options.

    Returns:
        A `Plan`: one row per norm layer, printable as a table; none if the model was converted before.

    Raises:
        UserError: unknown method or option, no norm layer, a pattern that fits none, a model that cannot be traced.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> plan(model, torch.randn(2, 3, 8, 8), method="fold").summary()
        'method=fold: 1 norm layer, 1 to replace'
    """
    check_model(model)
    given = example(inputs, kwargs)
    check_example(given)
    options |= _by_batch(method, batch_size, options)
    return _plan(find_method(method, options), model, given, options, norms, include, exclude)[0]


def _plan(
    method: Method,
    model: nn.Module,
    given: Example,
    options: dict[str, Any],
    norms: str | Sequence[str],
    include: Patterns,
    exclude: Patterns,
) -> tuple[Plan, Graph, bool | None]:
    """The plan, the graph that it is of, and the mode to finish in."""
    for name, value in (("include", include), ("exclude", exclude)):
        of_type(name, value, Patterns, 'pass patterns of paths, as "layer4*"')
    kinds = asked(method, norms)
    layers = norm_layers(model, kinds)
    if "" in layers:
        check_whole(model)
    sizes = Reference(method.compares == "everything")
    visit = None if method.compares == "nothing" else sizes.visit
    graph, mode = fullest_graph(model, given, visit, layers)
    sites = find_sites(model, graph, kinds)
    functions = [*function_rows(model, graph, kinds)]
    if not sites and not functions and not _is_converted(model):
        raise nothing_found(model, kinds)
    functions += [] if set(kinds) == {"batch"} else unknown_rows(model, graph)
    left = reasons_left([each.path for each in [*sites, *functions]], include, exclude)
    if method.leaves_frozen and include is None:
        left = {site.path: _FROZEN for site in sites if is_frozen(graph, site)} | left
    if include is None:
        bounded = [site for site in sites if site.kind != "batch" and attention_reads(graph, site)]
        left = {site.path: _ATTENTION for site in bounded} | left
    if method.compares != "nothing":  # a constant that was not measured could be anything
        left = {site.path: _UNREACHED for site in sites if not site.calls} | left
    rows = [site_row(site, "leave", "", left[site.path]) for site in sites if site.path in left]
    chosen = []
    for site in sites:
        if site.path in left:
            continue
        reason = reason_against(graph, site) or reason_of_kind(method, graph, site)
        if reason:
            rows.append(site_row(site, "refuse", "", reason))
        else:
            chosen.append(site)
    net = Net(model, graph, chosen, sizes, _samples(given), on_meta(model, given.listed))
    decided = _decided(method, net) if chosen else []
    shown = {} if norms == "batch" else {"norms": norms}
    shown |= {
        name: value for name, value in (("include", include), ("exclude", exclude)) if value is not None
    }
    calls = [row.left(left[row.path]) if row.path in left else row for row in functions]
    ordered, others = _in_order(method, sites, rows, decided)
    return Plan(method.name, shown | options, [*ordered, *calls], others), graph, mode


def _decided(method: Method, net: Net) -> list[Change | Start]:
    """What a method decides; refused where it is nothing that can be done."""
    found: Any = method.decide(net)
    if not isinstance(found, Iterable):
        raise UserError(f"method {method.name!r} decides {found!r}: expected changes; yield them in `decide`")
    decided = list(found)
    modules = dict(net.model.named_modules(remove_duplicate=False))
    for change in decided:
        if not isinstance(change, Change | Start):
            raise UserError(
                f"method {method.name!r} yields a {type(change).__name__}: expected a Change or a Start"
            )
        for edit in change.edits if isinstance(change, Change) else ():
            if edit.path not in modules:
                raise unknown(f"module to change by method {method.name!r}", edit.path, modules)
    return decided


def _in_order(
    method: Method, sites: list[Site], kept: list[Change], decided: Iterable[Change | Start]
) -> tuple[list[Change], list[Change | Start]]:
    """The sites' changes in the sites' order, and the others: also what is put behind a norm layer that is kept."""
    by_path = {change.path: change for change in kept}
    paths = {site.path for site in sites} - by_path.keys()
    others: list[Change | Start] = []
    for change in decided:
        if isinstance(change, Change) and change.path in paths:
            if change.path in by_path:
                raise UserError(
                    f"method {method.name!r} changes {change.path} twice: expected one change for each place"
                )
            by_path[change.path] = change
        else:
            others.append(change)
    missing = [site.path for site in sites if site.path not in by_path]
    if missing:
        raise UserError(
            f"method {method.name!r} has no change for {missing[0]}: expected one per norm layer; yield it in `decide`"
        )
    return [by_path[site.path] for site in sites], others


def _refuse_nothing(planned: Plan, include: Patterns, exclude: Patterns) -> None:
    """Refuse a conversion that would change nothing although norm layers were asked for."""
    chosen = reasons_left([row.path for row in planned], include, exclude)
    asked = [row for row in planned if row.path not in chosen]
    if asked and not any(row.action == "replace" for row in [*planned.rows, *planned.layers]):
        remedy = "pass inputs that reach it" if asked[0].reason == _UNREACHED else "see why in the table"
        raise ConversionError(
            f"nothing would be replaced: {counted(len(asked), 'norm layer')} left, the first, {asked[0].path}, since "
            f"{asked[0].reason}; {remedy}, or pass strict=False to get the model as it is:\n{planned}",
            planned,
        )


def _is_converted(model: nn.Module) -> bool:
    """Whether a model without norm layers has been through `convert`, or was built without them."""
    return NAME in vars(model) or any(isinstance(module, _ScaledStd) for module in model.modules())


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    *inputs: Any,
    method: str = "nf",
    norms: str | Sequence[str] = "batch",
    kwargs: Mapping[str, Any] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    batch_size: int | None = None,
    inplace: bool = False,
    strict: bool = True,
    **options: Any,
) -> nn.Module:
    """Turn a CNN full of BatchNorm into a trainable one without it.

    The user's class, attribute paths and `state_dict` prefixes stay; only norm layers and the layers that feed
    them are exchanged. Converting a model again, by whatever method, changes nothing but norm layers still there.

    Args:
        model: any model whose forward runs; it stays as it is unless `inplace`.
        *inputs: example inputs: real images if you have them, since methods measure on them.
        method: `"nf"` for training from scratch, `"fold"` to keep a trained function; `list_methods()` has all.
        norms: which norm layers, as for `plan`: `"batch"`, `"all"`, or kinds.
        kwargs: example inputs that the forward takes by keyword.
        include: shell patterns (`"layer4*"`) of paths; only norm layers at or below one of them are replaced, frozen
            ones too, which methods other than `fold` leave otherwise.
        exclude: patterns of paths; norm layers at or below one of them are left.
        batch_size: images in a batch of the training to come. Options that depend on it follow it where they are not
            given (`channelwise` of `nf`), and it stays with the model, for `nfnets.attach` and `nfnets.recipe`; a
            warning tells of fewer than 32 example images where the method measures on them; without it a line in the
            log, where so few decide an option.
        inplace: change `model` itself instead of a copy.
        strict: refuse the whole conversion if any norm layer cannot be converted, or if none would be although some
            are left that neither `include` nor `exclude` leaves; otherwise leave them.
        **options: the method's options.

    Returns:
        The converted model.

    Raises:
        ConversionError: something cannot be converted, or nothing would be (the whole table is in the message).
        UserError: unknown method or option, no norm layer, a pattern that fits none, a model that cannot be traced, or
            one whose copy would compute with the original's layers (its code reads the model by a global name).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> [type(layer).__name__ for layer in convert(model, torch.randn(2, 3, 8, 8))]
        ['ScaledStdConv2d', 'Identity', 'ReLU']

    Paper: arXiv 2101.08692, 2102.06171.
    """
    for name, value in (("inplace", inplace), ("strict", strict)):
        of_type(name, value, bool, "pass True or False")
    by_batch = _by_batch(method, batch_size, options)
    by_hand = set(options)
    options |= by_batch
    chosen = find_method(method, options)
    check_model(model, inplace)
    given = example(inputs, kwargs)
    check_example(given)
    planned, graph, mode = _plan(chosen, model, given, options, norms, include, exclude)
    if strict and planned.refused:
        count = len(planned.refused)
        raise ConversionError(
            f"{counted(count, 'norm layer')} cannot be converted; strict=False leaves {'it' if count == 1 else 'them'}:"
            f"\n{planned}",
            planned,
        )
    if strict and NAME not in vars(model):
        _refuse_nothing(planned, include, exclude)
    mark = _mark(model, chosen, given, batch_size, by_batch, by_hand)
    if mark.measured is not None and mark.measured < MANY and planned.edits:
        if batch_size is not None:
            warnings.warn(
                f"method {method!r} measures constants on {images(mark.measured)}: expected {MANY} or more; pass more "
                "example images, real ones if you have them",
                stacklevel=_CALLER,
            )
        elif mark.chosen:  # no warning: a look at a net needs no more, and warnings may be errors
            _log.warning(
                "%s %s too little of single channels, which are left as they are: give %d or more, or the batch size "
                "of the training to come",
                images(mark.measured).replace("image", "example image"),
                "tells" if mark.measured == 1 else "tell",
                MANY,
            )
    target = model if inplace else own_copy(model)
    if not planned.edits:
        if NAME in vars(target) and batch_size is not None:
            setattr(target, NAME, replace(vars(target)[NAME], batch_size=batch_size))
        return target
    # Of a copy, which is thrown away on failure, nothing has to be kept: old layers would be a third model in memory.
    undo: list[Undo] | None = [] if inplace else None
    try:
        became = apply_edits(target, planned.edits, undo)
        with transaction(backup=inplace):
            with in_mode(target, mode), completed(target, given), watched(model, target, became) as called:
                try:
                    after = _settle(target, given.listed, planned)
                except ForwardError as error:
                    raise UserError(
                        f"with the changes of method {method!r} the model's forward fails: {error.reason}; what stands "
                        "in a layer's place must take what that layer took, and put out its shape"
                    ) from error
            check_copy(model, target, graph, became, given, mode, (after, called))
    except BaseException:
        take_back(undo)
        raise
    setattr(target, NAME, mark)
    return target


def _by_batch(method: str, batch_size: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that follow from the batch size, where nobody sets them."""
    if batch_size is None:
        return {}
    found = conversion_options(method, whole("batch_size", batch_size))
    return {name: value for name, value in found.items() if name not in options}


def _mark(
    model: nn.Module,
    method: Method,
    given: Example,
    batch_size: int | None,
    by_batch: dict[str, Any],
    by_hand: set[str],
) -> Mark:
    """What the converted model is to tell `attach`; of a model that was converted before, both methods."""
    before = vars(model).get(NAME, Mark(()))
    measures = method.compares != "nothing" and not on_meta(model, given.listed)
    measured = _samples(given) if measures else None
    if batch_size is None and measured is not None:
        by_batch = conversion_options(method.name, measured)
    return Mark(
        tuple(dict.fromkeys((*before.methods, method.name))),
        before.batch_size if batch_size is None else batch_size,
        measured,
        tuple((name, value) for name, value in by_batch.items() if name not in by_hand),
    )


def _samples(given: Example) -> int:
    first = tensors_in(given.listed)[0]
    return len(first) if first.ndim else 1


def _settle(model: nn.Module, inputs: tuple[Any, ...], planned: Plan) -> Graph | None:
    """Initialize what was put in, and make the targets hold; on `meta` values come with the `state_dict`. Returns the
    graph of the pass in which they were set, if there was one."""
    graph = None
    if not on_meta(model, inputs):
        for start in planned.starts:
            start.run(model, *inputs)
        if planned.targets or planned.wake:
            graph, trials = set_scales(model, *inputs, targets=planned.targets, wake=planned.wake)
            for row in (trial.row() for trial in trials if planned.targets[trial.path].required):
                if row.action == "refused":
                    raise UserError(
                        f"{row.path} cannot be scaled: {row.reason}; exclude the norm layer that it feeds, "
                        'exclude="…", or use method="nf"'
                    )
                if row.action == "skipped":
                    _log.warning("convert: %s is left as it was: %s", row.path, row.reason)
    for path, target in planned.targets.items():
        layer = constant(model.get_submodule(path)) if target.by == "constant" else ""
        if not isinstance(layer, str) and measured_constant(layer.layer) is None:
            layer.mark()
    return graph
