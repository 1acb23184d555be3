"""The one engine that makes targets hold: one forward pass, each layer set right after it ran."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.errors import UserError, unknown
from nfnets.layers import Scale
from nfnets.scale.knob import Constant, Knob, channel_dim, constant, knob, origin_of, scaled_to
from nfnets.scale.one_pass import Call, Write, one_pass, transaction
from nfnets.scale.report import Row
from nfnets.scale.target import Spread, Target, form, spread_of
from nfnets.trace import Graph

TRIES = 20
"""How often a layer is run to find the multiple of its weight that fits."""
REASONS = (
    "",
    "its output is not finite",
    "dead: its output does not vary",
    "its bias alone varies more than the target: no weight reaches it",
    "the weight would overflow",
)


@dataclass(slots=True)
class Trial:
    """What happened at one call of a layer. Numbers stay on the device until the pass is over."""

    path: str
    action: str
    reason: str
    before: Tensor
    """Total variance."""
    after: tuple[Tensor, Tensor, Tensor]
    """Total variance, mean variance within a channel, mean squared channel mean."""
    factor: Tensor = field(default_factory=lambda: torch.tensor(math.nan, device="cpu"))
    code: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))
    """Per unit, or for all: an index into `REASONS`."""

    def row(self) -> Row:
        """As a row of a report; reads from the device."""
        before, total, within, mean_sq = (float(t) for t in (self.before, *self.after))
        measured: dict[str, Any] = {
            "std_before": math.sqrt(before) if before >= 0 else math.nan,
            "std": math.sqrt(total) if total >= 0 else math.nan,
            "channel_var": within,
            "channel_mean_sq": mean_sq,
        }
        left = self.code != 0
        share = float(left.float().mean())
        reason = "" if share == 0 else REASONS[int(self.code[left].min())]
        if share == 1:
            return Row(self.path, "skipped", reason, **measured)
        if share > 0:
            reason = f"{share:.0%} of its channels are left: {reason}"
        return Row(self.path, self.action, self.reason or reason, float(self.factor), **measured)


def set_scales(
    model: nn.Module,
    *inputs: Any,
    targets: Mapping[str, Target],
    wake: Collection[str] = (),
    **kwargs: Any,
) -> tuple[Graph, list[Trial]]:
    """Make every target hold, in ONE forward pass.

    A layer whose output is c·z + b for c times its weight, b its bias, is set to the c > 0 with S(c·z + b) = value²:

        c = (−S(z, b) + √(S(z, b)² − S(z, z) · (S(b, b) − value²))) / S(z, z)

    where S is the target's statistic as a quadratic form. The layer's weight (gain, constant) is multiplied by c and
    the rescaled output passed on, so that by induction over the execution order one pass gives what a fresh forward
    pass per layer would give. A layer called more than once is set by its first call. Left alone are layers whose
    output is dead or not finite, whose bias alone is larger than the target, whose weight is frozen, or whose output
    does not follow its weight.

    Args:
        model: changed in place; if anything raises, it is as it was.
        *inputs: example inputs.
        targets: by path of the module.
        wake: paths of layers in front of an activation without slope at 0 that are to change their sign if no example
            activates them; those with a target are not among them.
        **kwargs: keyword arguments of the forward.

    Returns:
        The graph of the pass, and what happened at each call of a layer with a target.

    Raises:
        UserError: what the forward raises, or a target where there is nothing to multiply.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> graph, trials = set_scales(model, torch.randn(16, 3, 8, 8), targets={"0": Target(0.5)})
        >>> [(trial.path, trial.action) for trial in trials]
        [('0', 'set')]

    Paper: arXiv 1511.06422; per channel arXiv 1602.07868 §3.
    """
    for path, target in targets.items():
        _check(model, path, target)
    layers = {model.get_submodule(path) for path in (*targets, *wake)}
    with transaction() as write:
        step = _Step(targets, frozenset(wake), write)
        graph = one_pass(model, *inputs, select=layers.__contains__, rescale=step, **kwargs)
        for layer, value, _ in step.constants:  # they are buffers, which a pass leaves as they were
            write(layer.value, value)
    for layer, _, code in step.constants:
        layer.mark(centred=code is not None and not bool(code.any()))
    return graph, step.trials


def _check(model: nn.Module, path: str, target: Target) -> None:
    """Refuse a target where nothing could make it hold."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        near = path.rpartition(".")[0]
        raise unknown(
            "module for a target", path, [n for n, _ in model.named_modules() if n.startswith(near)]
        ) from None
    layer = (knob if target.by == "weight" else constant)(module)
    where = f"a target at {path!r} ({type(module).__name__})"
    if isinstance(layer, str) and not target.search:
        remedy = (
            "put a Scale there and pass by='constant', or target a layer with a weight, the one that feeds it"
        )
        if target.by == "weight" and not isinstance(constant(module), str):
            remedy = "pass by='constant'"
        raise UserError(f"{where}: {layer}; {remedy}")
    if target.channels is not None and target.by == "constant" and isinstance(module, Scale):
        alone = module._parameters.get("bias") is None
        if alone or target.channels != 1:  # a bias centres channels, but nothing scales each
            wanted = "leave channels out" if alone else "pass channels=1.0"
            raise UserError(f"{where} with channels={target.channels}: it has one constant for all; {wanted}")


class _Step:
    """What the pass calls: measures an output, writes the knob, returns the rescaled output."""

    def __init__(self, targets: Mapping[str, Target], wake: Collection[str], write: Write):
        self.targets, self.wake, self.write = targets, wake, write
        self.trials: list[Trial] = []
        self.constants: list[tuple[Constant, Tensor, Tensor | None]] = []
        self._owner: dict[int, str] = {}

    def __call__(self, call: Call) -> Tensor | None:
        target = self.targets.get(call.path)
        if target is None:
            return woken(call, self.write) if call.path in self.wake else None
        output, layer = call.output, (knob if target.by == "weight" else constant)(call.module)
        if not output.is_floating_point() or output.numel() < 2:
            return None
        if target.search and (isinstance(layer, str) or not layer.trusted):
            return None if call.index else searched(call, layer, target, self.write)
        if isinstance(layer, str):
            return None
        dim = layer.dim_of(output)
        spread = spread_of(output, dim)
        stats = _summary(spread)
        first = self._owner.setdefault(layer.identity, call.path)
        if first != call.path or call.index > 0:
            return self._left(call, "shared", f"set by the first call, of {first}", stats)
        if layer.frozen:
            return self._left(call, "frozen", "requires_grad is False", stats)
        replaced, trial = self._set(call, layer, target, spread, dim, stats)
        self.trials.append(trial)
        return replaced

    def _left(self, call: Call, action: str, reason: str, stats: tuple[Tensor, Tensor, Tensor]) -> None:
        self.trials.append(Trial(call.path, action, reason, stats[0], stats))

    def _set(
        self,
        call: Call,
        layer: Knob | Constant,
        target: Target,
        spread: Spread,
        dim: int,
        stats: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor | None, Trial]:
        rest = layer.rest()
        rest = spread.mean.new_zeros(()) if rest is None else rest.to(spread.mean.dtype)
        channels = target.channels if layer.takes_channels(spread) else None
        wanted, factor, code = solve(target, spread, rest, torch.finfo(call.output.dtype).eps, channels)
        old = [] if layer.trusted else [(t, t.detach().clone()) for t in layer.tensors()]
        if channels is None:
            factor, code = layer.multiply(factor, code, self.write)
            shift = None if layer.rest() is None else (1 - factor) * rest
        elif channels < math.inf:
            own = ratios(spread, channels)
            factor, code, shift = layer.center(factor, own, code, spread.mean, self.write)
        else:
            own, code = alike(wanted, spread)
            factor, code, shift = layer.center(torch.ones_like(wanted), own, code, spread.mean, self.write)
        replaced = scaled_to(call.output, factor, shift, dim)
        if not layer.trusted and not self._follows(call, replaced):
            for tensor, value in old:
                self.write(tensor, value)
            return None, Trial(call.path, "refused", "its output does not follow its weight", stats[0], stats)
        if isinstance(layer, Constant):
            self.constants.append((layer, layer.value.clone(), None if channels is None else code))
        mean = spread.mean * factor + (0 if shift is None else shift)
        after = _summary(Spread(mean, spread.var * factor.square(), spread.values))
        return replaced, Trial(call.path, "set", "", stats[0], after, factor.mean(), code)

    def _follows(self, call: Call, expected: Tensor) -> bool:
        """A subclass with a forward of its own is run again: does its output follow its weight?"""
        again = call.rerun()
        scale = expected.float().std()
        tolerance = 0.02 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3
        same = again.shape == expected.shape and (again - expected).float().std() <= tolerance * scale
        return bool(same) or not bool(torch.isfinite(scale))


def solve(
    target: Target, spread: Spread, rest: Tensor, eps: float, channels: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The value to reach, the factor c > 0 that reaches it, and an index into `REASONS` where there is none (c is 1).

    Args:
        target: what is to hold.
        spread: moments of the output.
        rest: what the layer adds to each channel whatever its weight.
        eps: of the output's type.
        channels: whether each channel's mean goes, too: then the root mean square is the standard deviation.
    """
    zz, zb, bb = form(target.statistic, spread, rest)
    now = zz + 2 * zb + bb
    wanted = torch.full_like(zz, target.value)
    if target.at_most < math.inf:
        square = now if channels is not None else spread.var.mean() + spread.mean.square().mean()
        wanted = wanted.minimum(
            (now / square).sqrt() * target.at_most
        )  # scaling leaves the share of the variance
    root = zb.square() - zz * (bb - wanted.square())
    factor = (root.clamp_min(0).sqrt() - zb) / zz
    noise = 0.0 if target.statistic == "mean square" else (4 * eps * spread.mean.abs().amax()) ** 2
    code = torch.where((root >= 0) & (factor > 0), 0, 3)
    code = torch.where((zz > noise) & torch.isfinite(factor), code, 2)
    code = torch.where(torch.isfinite(zz + zb), code, 1)
    low, high = target.unless
    kept = (now >= (low * wanted).square()) & (now <= (high * wanted).square()) & (low != high)
    return wanted, torch.where((code == 0) & ~kept, factor, 1), code


def searched(call: Call, layer: Knob | Constant | str, target: Target, write: Write) -> Tensor | None:
    """The output at the multiple of a weight that gives it the wanted statistic; None, and all as it was, if there is
    none: spectral norm takes every factor back."""
    parameter = origin_of(call.module) if isinstance(layer, str) else layer.tensors()[0]
    if parameter is None or not parameter.requires_grad:
        return None

    def size(output: Tensor) -> float:
        spread = spread_of(output, channel_dim(call.module))
        return math.sqrt(max(0.0, float(form(target.statistic, spread, spread.mean.new_zeros(()))[0])))

    old, factor, now = parameter.detach().clone(), 1.0, size(call.output)
    low, high = (limit * target.value for limit in target.unless)
    if not math.isfinite(now) or low <= now <= high:
        return None
    for _ in range(TRIES):
        if not 0 < now < math.inf:
            break
        factor *= target.value / now
        write(parameter, old * factor)
        output = call.rerun()
        now = size(output)
        if math.isclose(now, target.value, rel_tol=0.01):
            return output
    write(parameter, old)
    return None


def ratios(spread: Spread, limit: float) -> Tensor:
    """How much larger each channel is to become than the layer's factor makes it, for the variance of them all."""
    own = (spread.var.mean() / spread.var).sqrt()
    return own.nan_to_num(1.0, limit, 1 / limit).clamp(1 / limit, limit)


def alike(wanted: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
    """The factor that gives each channel the same standard deviation, and an index into `REASONS` for each."""
    count = spread.values // spread.mean.numel()
    std = (spread.var * (count / max(count - 1, 1))).sqrt()
    noise = 4 * torch.finfo(std.dtype).eps * spread.mean.abs()
    factor = wanted / std
    code = torch.where((std > noise) & torch.isfinite(factor), 0, 2)
    return factor, torch.where(torch.isfinite(std), code, 1)


def woken(call: Call, write: Write) -> Tensor | None:
    """Change the sign of a layer whose output is nowhere above 0, where an activation without slope at 0 follows.

    Without norm layers the features that a gate reads have means, and its few hidden units may all be off for all
    samples: of a symmetric draw the negative is as good.
    """
    layer, output = knob(call.module), call.output
    if call.index or isinstance(layer, str) or not output.is_floating_point():
        return None
    if not layer.trusted or layer.frozen or not output.numel():
        return None
    if float(output.amax()) > 0 or float(output.amin()) == 0:
        return None
    for tensor in layer.tensors():
        write(tensor, -tensor.detach())
    return -output


def _summary(spread: Spread) -> tuple[Tensor, Tensor, Tensor]:
    """Total variance (as `torch.var`), mean variance within a channel, mean squared channel mean."""
    within = spread.var.mean()
    total = (within + spread.mean.var(correction=0)) * (spread.values / max(spread.values - 1, 1))
    return total, within, spread.mean.square().mean()
