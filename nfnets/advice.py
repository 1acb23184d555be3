"""What a converted model needs in training: clipping, optimizer and rates, by method and batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nfnets.errors import UserError
from nfnets.given import check_module, check_text, counted, shown
from nfnets.layers import _ScaledStd
from nfnets.marked import Mark, marks_of

MANY = 32
"""Samples from which on `nf` sets single channels, of an example batch as of a training batch."""

# What makes the logits is clipped at so many times λ: enough to stop the one step that throws it off, and too much to
# slow it. Unclipped it does, from the rates on that BatchNorm forgives (docs/experiments.md, "The head").
HEAD = 20.0

# Middle of the rates to search, by optimizer and images per step: the best ones of docs/results, to one digit. The nets
# there are small and the runs short, so they say where to start and no more.
_NF_RATES = {"sgd": {4: 0.01, 64: 0.1, 512: 0.5}}


@dataclass(frozen=True)
class _Rule:
    """A method's needs. `at_64` is λ at 64 images a step, None where nothing is clipped."""

    at_64: float | None = 0.05
    why: str = ""
    head: float | None = HEAD
    centralization: bool = False
    rates: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


def _normalized(rates: dict[int, float] | None = None) -> _Rule:
    why = "it normalizes, which bounds gradients by itself"
    return _Rule(None, why, None, rates={"sgd": rates} if rates else {})


_RULES = {
    "bn": _normalized({4: 0.01, 64: 0.1, 512: 0.3}),
    "gn": _normalized({4: 0.025, 32: 0.1, 128: 0.15, 512: 0.3}),
    "ws_gn": _normalized({4: 0.08, 32: 0.2, 128: 0.4, 512: 0.3}),
    "ln": _normalized(),
    "online": _normalized(),
    "bcn": _normalized(),
    "ghost_bn": _normalized({32: 0.2, 128: 0.4, 512: 0.3}),
    "evonorm_s0": _normalized(),
    "nf": _Rule(rates=_NF_RATES),
    # A net that was trained has more to lose than to learn from a large step, and its head has been trained.
    "fold": _Rule(0.035, head=None, centralization=True, rates={"adamw": {4: 0.001}, "sgd": {4: 0.005}}),
    "tune": _Rule(None, "its gradients are those of the original network in evaluation mode", None),
    # Scalars that start at zero are clipped to λ · ε, so that a step moves them by millionths: branches stay shut.
    "skipinit": _Rule(
        None,
        "its scalars start at zero, and clipped gradients would not move them",
        None,
        rates={"sgd": {4: 0.04, 32: 0.2, 128: 0.15, 512: 0.1}},
    ),
    "dyt": _Rule(None, "its layers bound what they put out", None),
    "derf": _Rule(None, "its layers bound what they put out", None),
    "fixup": _Rule(rates={"sgd": {4: 0.08, 32: 0.4, 512: 0.9}}),
    "fixed_variance": _Rule(rates={"sgd": {4: 0.015, 32: 0.07, 128: 0.15, 512: 0.1}}),
}


def _rule(method: str) -> _Rule:
    return _RULES.get(method, _Rule())


def clipping(method: str, batch_size: int) -> float | None:
    """Adaptive gradient clipping's λ for a conversion method at a batch size; None is off.

    λ = 0.05 · √(64 / batch size), 0.7 of that for `fold`; off for `skipinit`, `tune` and methods that normalize.

    The larger the batch, the higher the learning rate that it can use and the less noise hides a bad step: λ has
    to tighten (arXiv 2102.06171 §4.1 finds the same). It stays on at small ones: at batch 4 a converted MobileNetV2
    that is not clipped stays at chance from a rate of 0.003 on. SkipInit's scalars start at zero, where a clipped
    gradient moves them by no more than λ · ε · lr: its branches hardly open. A folded net that was trained well has
    more to lose than to learn from a large step (docs/experiments.md).

    Args:
        method: "bn" or a conversion method.
        batch_size: Images per optimizer step.

    Returns:
        λ rounded to two digits, or None.

    Example:
        >>> clipping("nf", 64), clipping("nf", 4), clipping("fold", 4), clipping("skipinit", 64)
        (0.05, 0.2, 0.14, None)
    """
    at_64 = _rule(method).at_64
    return None if at_64 is None else float(f"{at_64 * (64 / batch_size) ** 0.5:.2g}")


def conversion_options(method: str, batch_size: int) -> dict[str, Any]:
    """The options of a conversion that follow from a run's batch size where nobody sets them.

    `nf` sets single channels from 32 images a step on: DenseNet needs that at batch 64, MobileNetV2 loses eight points
    by it at batch 4 (docs/experiments.md). The images that it measures on are as many in both.

    Args:
        method: "bn" or a conversion method.
        batch_size: Images per optimizer step.

    Returns:
        Options by name.

    Example:
        >>> conversion_options("nf", 64), conversion_options("nf", 4), conversion_options("lsuv", 4)
        ({'channelwise': True}, {'channelwise': False}, {})
    """
    return {"channelwise": batch_size >= MANY} if method == "nf" else {}


def usual_optimizer(method: str) -> str:
    """The optimizer that a method was measured with first, as `nfnets train` calls it.

    Example:
        >>> usual_optimizer("nf"), usual_optimizer("fold")
        ('sgd', 'adamw')
    """
    return next(iter(_rule(method).rates), "sgd")


def middle_rate(method: str, batch_size: int, optimizer: str) -> float | None:
    """The middle of the learning rates to search: measured, or on a straight line in logarithms between measured ones.

    Below the smallest batch size that was measured, and beyond the largest, it goes with √(batch size).

    Args:
        method: "bn" or a conversion method.
        batch_size: Images per optimizer step.
        optimizer: "sgd" or "adamw".

    Returns:
        The rate, rounded to two digits; None if this method was not measured with this optimizer.

    Example:
        >>> middle_rate("nf", 64, "sgd"), middle_rate("nf", 16, "sgd"), middle_rate("fold", 16, "adamw")
        (0.1, 0.032, 0.002)
    """
    known = _rule(method).rates.get(optimizer)
    if not known:
        return None
    below = [size for size in known if size <= batch_size]
    above = [size for size in known if size >= batch_size]
    low, high = max(below, default=min(known)), min(above, default=max(known))
    if low < high:
        share = math.log(batch_size / low) / math.log(high / low)
        rate = known[low] * (known[high] / known[low]) ** share
    else:
        rate = known[low] * (batch_size / low) ** 0.5
    return float(f"{rate:.2g}")


def _rates(method: str, batch_size: int, optimizer: str) -> tuple[tuple[float, ...], str]:
    """Rates to search, the middle one in the middle, and where they come from."""
    middle, source = middle_rate(method, batch_size, optimizer), method
    if middle is None and not _rule(method).rates:
        middle, source = middle_rate("nf", batch_size, optimizer), "nf"
    if middle is None:
        return (), f"not measured with {optimizer}"
    known = _rule(source).rates[optimizer]
    if batch_size in known:
        how = f"measured at {batch_size} images"
    elif min(known) < batch_size < max(known):
        low = max(size for size in known if size < batch_size)
        how = (
            f"interpolated between measurements at {low} and {min(s for s in known if s > batch_size)} images"
        )
    else:
        nearest = min(known) if batch_size < min(known) else max(known)
        how = f"extrapolated by √(images) from a measurement at {nearest} images"
    others = "" if source == method else f" with {source}, not with {method}"
    return tuple(float(f"{factor * middle:.2g}") for factor in (0.5, 1, 2)), how + others


@dataclass(frozen=True)
class Recommendation(Mapping[str, Any]):
    """What `recipe` returns: its text is for people, `dict(…)` of it for programs.

    Args:
        method: how the model was converted.
        batch_size: images per optimizer step.
        convert: options of the conversion that follow from the batch size.
        optimizer: "sgd" (with momentum 0.9) or "adamw".
        learning_rates: to start the search from; empty where nothing was measured.
        rates_from: whether they are measured, interpolated or extrapolated.
        clipping: λ of adaptive gradient clipping; None is off.
        head: at how many times λ the weights that make the logits are clipped; None leaves them alone.
        centralization: whether gradients are centralized before they are clipped.
        reasons: why, by name.
    """

    method: str
    batch_size: int
    convert: dict[str, Any]
    optimizer: str
    learning_rates: tuple[float, ...]
    rates_from: str
    clipping: float | None
    head: float | None
    centralization: bool
    reasons: dict[str, str]

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.convert.items())
        names = {"sgd": "SGD with momentum 0.9", "adamw": "AdamW"}
        rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
        lines = {
            "convert": f"{options}; {self.reasons['convert']}" if options else "",
            "optimizer": names.get(self.optimizer, self.optimizer),
            "learning rate": f"search {rates} ({self.rates_from})" if rates else self.rates_from,
            "clipping": ("off" if self.clipping is None else f"λ = {self.clipping:g}")
            + f"; {self.reasons['clipping']}",
            "head": f"{self.head:g} λ; {self.reasons['head']}" if self.head is not None else "",
            "centralization": f"on; {self.reasons['centralization']}" if self.centralization else "",
        }
        width = max(map(len, lines))
        title = f"{self.method}, {images(self.batch_size)} per optimizer step"
        return "\n".join([title, *(f"  {name:{width}}  {line}" for name, line in lines.items() if line)])

    __repr__ = __str__


def recipe(
    model: nn.Module | str, batch_size: int | None = None, *, optimizer: str | None = None
) -> Recommendation:
    """What to train a converted model with: optimizer, learning rates to try first, clipping, and why.

    λ = 0.05 · √(64 / batch_size) for most methods. The rates are where to start a search: they were the best ones of
    small nets in short runs (docs/results). If the highest or the lowest wins, go on in that direction.

    Args:
        model: a converted model, or the name of a method (`"nf"`).
        batch_size: images per optimizer step: those of a batch, times the accumulated batches, times the processes.
            None takes the one that `convert` was given.
        optimizer: "sgd" or "adamw"; None is what the method was measured with first.

    Returns:
        A `Recommendation`: print it, or read it like a dictionary.

    Raises:
        UserError: a model that was not converted here, or no batch size.

    Example:
        >>> print(recipe("nf", batch_size=4))
        nf, 4 images per optimizer step
          convert         channelwise=False; channel statistics help from 32 images per step on
          optimizer       SGD with momentum 0.9
          learning rate   search 0.005, 0.01, 0.02 (measured at 4 images)
          clipping        λ = 0.2; 0.05 · √(64 / 4)
          head            20 λ; one step must not throw the logits off
        >>> recipe("fold", batch_size=16)["learning_rates"]
        (0.001, 0.002, 0.004)

    Paper: arXiv 2102.06171, section 4 (clipping).
    """
    if isinstance(model, str):
        method = model
    else:
        check_module(model)
        method = method_of(model)
    batch_size = batch_size_of(model if isinstance(model, nn.Module) else None, batch_size)
    return recommended(method, batch_size, optimizer)


def recommended(method: str, batch_size: int, optimizer: str | None = None) -> Recommendation:
    """`recipe` for a method by its name, which may be anybody's own.

    Example:
        >>> recommended("mine", 64).clipping
        0.05
    """
    rule, optimizer = _rule(method), optimizer or usual_optimizer(method)
    found = clipping(method, batch_size)
    rates, rates_from = _rates(method, batch_size, optimizer)
    return Recommendation(
        method,
        batch_size,
        conversion_options(method, batch_size),
        optimizer,
        rates,
        rates_from,
        found,
        None if found is None else rule.head,
        rule.centralization,
        {
            "convert": f"channel statistics help from {MANY} images per step on",
            "clipping": rule.why if rule.at_64 is None else f"{rule.at_64:g} · √(64 / {batch_size})",
            "head": "one step must not throw the logits off",
            "centralization": "a folded net has nothing else that keeps a step from moving the mean of a filter",
        },
    )


def method_of(model: nn.Module, method: str | None = None) -> str:
    """The method that a model was converted by.

    Args:
        model: converted, or with converted parts; one of ours that was built without norm layers counts as `nf`.
        method: what the user says.

    Raises:
        UserError: it is not known, or parts were converted by different methods.
    """
    if method is not None:
        check_text(method, "method", "nf")
        return method
    methods = list(dict.fromkeys(name for mark in marks_of(model) for name in mark.methods))
    if len(methods) > 1:
        raise UserError(
            f"parts of the model were converted by {', '.join(methods)}: expected one method to go by; "
            f'pass method="{methods[0]}"'
        )
    if methods:
        return methods[0]
    if any(isinstance(module, _ScaledStd) for module in model.modules()):
        return "nf"
    raise UserError(
        f"{type(model).__name__} was not converted by nfnets.convert: expected a converted model; convert it first, "
        'or pass method="nf"'
    )


def batch_size_of(model: nn.Module | None, batch_size: int | None = None) -> int:
    """The batch size: what the user says, or what `convert` was told.

    Raises:
        UserError: neither, several, or no whole number above 0.
    """
    if batch_size is not None:
        return whole("batch_size", batch_size)
    known = {mark.batch_size for mark in (marks_of(model) if model else []) if mark.batch_size is not None}
    if len(known) == 1:
        return known.pop()
    given = (
        f"parts were converted for {', '.join(map(str, sorted(known)))} images"
        if known
        else "batch_size is not known"
    )
    raise UserError(
        f"{given}: expected how many images a batch has; pass batch_size=…, here or to nfnets.convert"
    )


def whole(name: str, value: Any) -> int:
    """A whole number above 0.

    Raises:
        UserError: it is none.

    Example:
        >>> whole("batch_size", 4)
        4
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={shown(value)}: expected a whole number above 0; pass {name}=4")
    return value


def images(count: int) -> str:
    """A number of images in words.

    Example:
        >>> images(1), images(4)
        ('1 image', '4 images')
    """
    return counted(count, "image")


def differing(marks: list[Mark], method: str, batch_size: int) -> dict[str, tuple[Any, Any]]:
    """Options that a conversion chose by its batch size and that follow otherwise from this one: (was, is)."""
    now = conversion_options(method, batch_size)
    chosen = [(name, value) for mark in marks if method in mark.methods for name, value in mark.chosen]
    return {name: (value, now[name]) for name, value in chosen if name in now and now[name] != value}
