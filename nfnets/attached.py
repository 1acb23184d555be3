"""`attach`: all that a converted model needs before a step of its optimizer, in one line."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from nfnets.advice import (
    MANY,
    Recommendation,
    batch_size_of,
    differing,
    images,
    method_of,
    recommended,
    whole,
)
from nfnets.agc import AGCHandle, _check_limits, attach_agc
from nfnets.before_step import BeforeStep, Exclude, _check_stepped
from nfnets.centralization import attach_centralization
from nfnets.errors import UserError
from nfnets.given import shown
from nfnets.head import head_layers
from nfnets.marked import marks_of

Auto = Literal["auto"]


class Attached:
    """What `attach` returns; `print` shows what was chosen, and why.

    Attributes:
        recommendation: what `nfnets.recipe` gives for the method and the images per optimizer step; None where all
            was set by hand and neither was needed.
        clipping: the handle of `attach_agc`, with its `.stats`; None where nothing is clipped.
        centralization: the handle of `attach_centralization`; None where it is off.
        lines: what was chosen, and why, a line each.
    """

    def __init__(
        self,
        recommendation: Recommendation | None,
        clipping: AGCHandle | None,
        centralization: BeforeStep | None,
        lines: list[str],
    ) -> None:
        self.recommendation, self.clipping, self.centralization = recommendation, clipping, centralization
        self.lines = lines

    def remove(self) -> None:
        """Leave gradients as they are from now on."""
        for handle in (self.clipping, self.centralization):
            if handle is not None:
                handle.remove()

    def __str__(self) -> str:
        return "\n  ".join(self.lines)

    __repr__ = __str__


def attach(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    batch_size: int | None = None,
    *,
    method: str | None = None,
    accumulate: int = 1,
    world_size: int | None = None,
    clipping: float | Auto | None = "auto",
    head: float | Auto | None = "auto",
    centralization: bool | Auto = "auto",
    eps: float = 1e-3,
    exclude: Exclude = "head",
    verbose: bool = True,
) -> Attached:
    """All that a converted model needs before every step of its optimizer: clipping and centralization by its method.

    λ = 0.05 · √(64 / images per step) with images per step = batch_size · accumulate · world_size, see `nfnets.recipe`.
    It is `attach_centralization`, for folded nets, and `attach_agc`, for methods that do not normalize, with the
    values that `nfnets train` uses.

    Args:
        optimizer: any `torch.optim.Optimizer`; of a wrapper (Lookahead, Accelerate) the inner one.
        model: whose parameters it steps, converted or with converted parts; DDP, `fully_shard` and compiled ones too.
        batch_size: images in a batch of one process, as the data loader gives them. None takes the one that `convert`
            was given.
        method: the model's conversion method, if it was converted elsewhere.
        accumulate: batches whose gradients are added up before a step.
        world_size: processes that average their gradients. None takes that of `torch.distributed`, 1 without it.
        clipping: λ of adaptive gradient clipping; None is off.
        head: at how many times λ the weights that make the logits are clipped; None leaves it to `exclude`. Weights
            that are zero, as Fixup's, are left alone: a clipped gradient would hardly move them.
        centralization: whether gradients are centralized before they are clipped.
        eps: ε of adaptive gradient clipping.
        exclude: what to leave alone, as for `attach_agc`.
        verbose: print what was chosen, on the first process, and warn of what does not fit.

    Returns:
        An `Attached`: `.clipping` and `.centralization` are the handles (None where off), `.remove()` takes both away.

    Raises:
        UserError: a second call, no batch size, a model that was not converted here and no `method`, values out of
            bounds, or what `attach_agc` refuses. Nothing is changed then.

    Example:
        >>> from nfnets import convert, param_groups
        >>> bn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> nf = convert(bn, torch.randn(32, 3, 8, 8), batch_size=4)
        >>> optimizer = torch.optim.SGD(param_groups(nf, lr=0.01, weight_decay=5e-4), momentum=0.9)
        >>> handle = attach(optimizer, nf)
        nfnets.attach: nf, 4 images per step
          clipping: λ = 0.2, since 0.05 · √(64 / 4); the weights that make the logits at 20 λ
          learning rate: 0.01; try 0.005, 0.01, 0.02 first (measured at 4 images)

    Paper: arXiv 2102.06171, section 4 (clipping); arXiv 2004.01461 (centralization).
    """
    _check_given(clipping, head, centralization, eps)
    _check_stepped(optimizer, model)
    parts = {
        "accumulated": whole("accumulate", accumulate),
        "processes": _processes(model) if world_size is None else whole("world_size", world_size),
    }
    advice = None
    if "auto" in (clipping, head, centralization):
        named = method_of(model, method)
        parts = {"batch": batch_size_of(model, batch_size), **parts}
        advice = recommended(named, math.prod(parts.values()), _kind(optimizer))
        clipping = advice.clipping if clipping == "auto" else clipping
        head = advice.head if head == "auto" else head
        centralization = advice.centralization if centralization == "auto" else centralization
    limit = head if isinstance(head, int | float) and has_weights(model) else None
    central = attach_centralization(optimizer, model, exclude) if centralization else None
    try:
        agc = None if clipping is None else attach_agc(optimizer, model, clipping, eps, exclude, limit)
    except BaseException:
        if central is not None:
            central.remove()
        raise
    handle = Attached(advice, agc, central, _lines(advice, parts, agc, central, optimizer, model))
    if verbose:
        _tell(handle, optimizer)
    return handle


def has_weights(model: nn.Module) -> bool:
    """Whether the weights that make the logits are not all zero: those that are, as Fixup's, must not be clipped.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> has_weights(net)
        True
        >>> _ = nn.init.zeros_(net.weight)
        >>> has_weights(net)
        False
    """
    weights = [p for layer in head_layers(model) for p in layer.parameters() if p.ndim > 1]
    return any(weight.is_meta or bool(weight.any()) for weight in weights)


def _check_given(clipping: Any, head: Any, centralization: Any, eps: Any) -> None:
    numbers = (1.0 if each in ("auto", None) else each for each in (clipping, head))
    by_hand, at_head = numbers
    _check_limits(by_hand, eps, at_head)
    if centralization not in (True, False, "auto"):
        raise UserError(
            f'centralization={shown(centralization)}: expected True, False or "auto"; pass one of these'
        )


def _processes(model: nn.Module) -> int:
    """How many processes average their gradients."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return dist.get_world_size(model.process_group)
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """What `nfnets train` calls it, or its class."""
    if isinstance(optimizer, torch.optim.SGD):
        return "sgd"
    return "adamw" if isinstance(optimizer, torch.optim.AdamW) else type(optimizer).__name__


def _lines(
    advice: Recommendation | None,
    parts: dict[str, int],
    agc: AGCHandle | None,
    central: BeforeStep | None,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
) -> list[str]:
    """What was chosen, and why."""
    reasons = {} if advice is None else advice.reasons
    λ = None if agc is None else agc.clipping
    why = f", since {reasons['clipping']}" if advice is not None and λ == advice.clipping else ", as given"
    lines = ["nfnets.attach: all given by hand"]
    if advice is not None:
        several = [f"{count} {name}" for name, count in parts.items() if name != "batch" and count > 1]
        of = f" (batches of {parts['batch']} × {' × '.join(several)})" if several else ""
        lines = [f"nfnets.attach: {advice.method}, {images(advice.batch_size)} per step{of}"]
    line = f"clipping: {'off' if λ is None else f'λ = {λ:g}'}{why}"
    if agc is not None and agc.head is not None:
        line += f"; the weights that make the logits at {agc.head:g} λ"
    if agc is not None and agc.excluded:
        line += f"; not clipped: {', '.join(agc.excluded)}"
    lines.append(line)
    if central is not None:
        given = advice is None or not advice.centralization
        lines.append(f"centralization: on, {'as given' if given else 'since ' + reasons['centralization']}")
    if advice is not None:
        rate = max(float(group["lr"]) for group in optimizer.param_groups if "lr" in group)
        first = ", ".join(f"{each:g}" for each in advice.learning_rates)
        advised = f"try {first} first ({advice.rates_from})" if first else advice.rates_from
        lines += [f"learning rate: {rate:g}; {advised}", *_notes(advice, model)]
    return lines


def _notes(advice: Recommendation, model: nn.Module) -> Iterator[str]:
    """What does not fit."""
    marks = [mark for mark in marks_of(model) if advice.method in mark.methods]
    for name, (was, now) in differing(marks, advice.method, advice.batch_size).items():
        yield (
            f"note: the model was converted with {name}={was}; {images(advice.batch_size)} per step want "
            f"nfnets.convert(…, {name}={now})"
        )
    few = [mark.measured for mark in marks if mark.measured is not None and mark.measured < MANY]
    if few:
        yield f"note: convert measured on {images(min(few))}; give it {MANY} or more"
    if not model.training:
        yield "note: the model is in evaluation mode; call model.train() before training"


def _tell(handle: Attached, optimizer: torch.optim.Optimizer) -> None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        print(handle)
    advice = handle.recommendation
    if advice is not None and advice.method == "fold" and advice.optimizer == "sgd":
        best = recommended("fold", advice.batch_size)
        warnings.warn(
            "a folded model is trained by SGD: at the rates of other models SGD destroys it, and at its best it ends "
            f"below AdamW; use torch.optim.AdamW with lr={best.learning_rates[1]:g}",
            stacklevel=3,
        )
