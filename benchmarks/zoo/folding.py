"""`fold`, `tune` under randomized statistics: the evaluation function must stay, in fp32 and in fp64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.zoo.build import DETECTION, Entry, spilled
from benchmarks.zoo.checks import Verdict
from benchmarks.zoo.measure import deviation
from nfnets.convert import convert
from nfnets.copying import deep_copy
from nfnets.trace import is_batch_norm_like

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


_WIDTHS = (1.0, 1.0, 1.0, 0.5, 0.25, 0.0)
"""Of the ranges that statistics are drawn from, as shares of the exponent, one draw after another; 0 draws none."""
_STEADY = 1e-5
_MOST = 0.3
"""Rounding beyond which nothing can be said: outputs that differ by their own size are never passed."""


def same_function(
    entry: Entry, model: nn.Module, inputs: tuple[Any, ...], method: str = "fold"
) -> dict[str, Verdict]:
    """Outputs of the converted model beside the BN model's, relative difference in the 2-norm, evaluation mode.

    Statistics under which the BN model's own fp32 outputs differ from its fp64 outputs by more than 1e-5 test
    rounding, not folding: they are drawn anew, at last from narrower ranges or not at all (the verdict says so), and
    the steadiest is taken. Where the BN model or the folded one amplifies rounding all the same, they may differ by
    three times what their own rounding does, which is measured: in fp32 beside fp64, in fp64 beside a run whose every
    layer's output is off by a few units in the last place (in fp32, too, for a model that does not run in fp64).

    Of a detector, whose boxes are chosen by sorting, the backbone's features. No verdict in fp64 for a model
    that does not run in it.
    """
    if entry.kind == DETECTION:
        inputs = (inputs[0],)
    else:
        inputs = tree_map_only(Tensor, lambda t: t[:2], inputs)
    wide_inputs = tree_map_only(Tensor, _double, inputs)
    best = math.inf
    note, truth = "", None
    for seed, width in enumerate(_WIDTHS):
        drawn = spilled(entry, _randomized(model, inputs, seed, width))
        narrow = _outputs(entry, drawn, inputs)
        doubled = spilled(entry, _widened_(deep_copy(drawn)))
        try:
            exact = _outputs(entry, doubled, wide_inputs)
        except Exception:  # fp32 constants inside the model (RAFT)
            subject, before = drawn, narrow
            break
        rounding = deviation(exact, narrow)
        if rounding < best or truth is None:
            best, subject, before, wide, truth = rounding, drawn, narrow, doubled, exact
            note = (
                ""
                if width == 1
                else f"; variances within 10^±{5 * width:g} of 0.1"
                if width
                else "; own statistics"
            )
        if rounding <= _STEADY:
            break
    del drawn, doubled  # or they would hold what is let go of below
    if truth is None:
        own = deviation(before, _outputs(entry, subject, inputs, jitter=4 * torch.finfo(torch.float32).eps))
    folded = convert(subject, *inputs, method=method, inplace=True)
    after = _outputs(entry, folded, inputs)
    if truth is None:
        return {"same function 32": _verdict(before, after, TOLERANCES[torch.float32], own, note)}
    own = max(best, deviation(_outputs(entry, _widened_(folded), wide_inputs), after))
    found = {"same function 32": _verdict(before, after, TOLERANCES[torch.float32], own, note)}
    del subject, folded
    jittered = _outputs(entry, wide, wide_inputs, jitter=4 * torch.finfo(torch.float64).eps)
    own = deviation(truth, jittered)
    wide = convert(wide, *wide_inputs, method=method, inplace=True)
    after = _outputs(entry, wide, wide_inputs)
    return found | {"same function 64": _verdict(truth, after, TOLERANCES[torch.float64], own, note)}


def _verdict(before: list[Tensor], after: list[Tensor], tolerance: float, own: float, note: str) -> Verdict:
    worst = deviation(before, after)
    level = max(float(t.abs().max()) for t in before)
    if worst > tolerance:
        note += f"; the models' own rounding moves them by {own:.1e}"
    allowed = max(tolerance, 3 * min(own, _MOST))
    return Verdict(
        worst <= allowed, f"differs by {worst:.1e} (relative), outputs up to {level:.1e}{note}", worst
    )


def _randomized(model: nn.Module, inputs: tuple[Any, ...], seed: int, width: float) -> nn.Module:
    subject = deep_copy(model).eval()
    if width == 0:
        return subject
    handles = randomizing(subject, torch.Generator().manual_seed(3 + seed), width)
    with torch.no_grad():
        subject(*tree_map_only(Tensor, torch.clone, inputs))
    for handle in handles:
        handle.remove()
    return subject


def randomizing(model: nn.Module, generator: torch.Generator, width: float = 1.0) -> list[Any]:
    """Hooks that give every norm layer statistics, γ and β at random, when it first runs in evaluation mode.

    Means ±10^U(−6, 4), variances 10^U(−6, 4) (exponents `width` times as wide, around 0.1), one in ten exactly 0 and
    one in twenty subnormal; γ of either sign, one
    in ten 0; β in U(−½, ½). |γ| is drawn so that a channel's output, β aside, has a root mean square of ½ to 1½ on
    the example inputs: otherwise the products of a few layers leave fp32 and there is nothing to compare. A norm
    layer without γ gets statistics around those of its input.
    """
    handles = []
    for module in model.modules():
        if is_batch_norm_like(module):
            handle = module.register_forward_pre_hook(_once(generator, width))
            handles.append(handle)
    return handles


def _once(generator: torch.Generator, width: float) -> Any:
    done: list[bool] = []

    def hook(norm: Any, args: tuple[Any, ...]) -> None:
        if not done and norm.running_mean is not None and args[0].numel():  # a mask head may see no box
            done.append(True)
            randomize_(norm, args[0], generator, width)

    return hook


@torch.no_grad()
def randomize_(norm: Any, x: Tensor, generator: torch.Generator, width: float = 1.0) -> None:
    """Draw one norm layer's statistics, γ and β; see `randomizing`."""
    channels = x.shape[
        1
    ]  # lightly's SplitBatchNorm keeps statistics for each split, and evaluates by the first
    means, variances = norm.running_mean[:channels], norm.running_var[:channels]
    uniform = lambda: torch.rand(channels, generator=generator, dtype=torch.float64)  # noqa: E731
    values = x.detach().double().transpose(0, 1).flatten(1)
    mean, variance = values.mean(1), values.var(1, correction=0)
    if getattr(norm, "weight", None) is None:
        means.copy_(mean + (uniform() - 0.5) * variance.sqrt())
        variances.copy_((variance + 1e-3) * 4 ** (2 * uniform() - 1))
        return
    sign = torch.where(uniform() < 0.5, -1.0, 1.0)
    exponents = [width * (10 * uniform() - 5) - 1 for _ in range(2)]
    centers, spreads = sign * 10 ** exponents[0], 10 ** exponents[1]
    kind = uniform()
    spreads[kind < 0.1] = 0.0
    means.copy_(centers)
    variances.copy_(spreads)
    variances[(kind > 0.95).to(variances.device)] = 1e-40  # subnormal in fp32
    spread = (variances.double() + getattr(norm, "eps", 1e-5)).sqrt()
    # A mean that all but equals a channel that is all but constant leaves the rounding of a difference, in any model.
    away = (variance + (mean - means.double()) ** 2).sqrt()
    means[away < 0.01 * mean.abs()] *= -1
    level = (variance + (mean - means.double()) ** 2).sqrt() / spread
    gamma = torch.where(uniform() < 0.5, -1.0, 1.0) * (0.5 + uniform()) / level.clamp_min(1e-6)
    gamma[uniform() < 0.1] = 0.0
    norm.weight.copy_(gamma)
    norm.bias.copy_(uniform() - 0.5)


def _widened_(model: nn.Module) -> nn.Module:
    """The model in fp64, tensors in plain attributes too (TabNet's groups)."""
    for module in model.double().modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, _double(value))
    return model


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@torch.no_grad()
def _outputs(entry: Entry, model: Any, inputs: tuple[Any, ...], jitter: float = 0.0) -> list[Tensor]:
    run, given = (model.backbone, (torch.stack(inputs[0]),)) if entry.kind == DETECTION else (model, inputs)
    copies = tree_map_only(Tensor, torch.clone, given)
    handles = _jittering(run, jitter) if jitter else []
    outputs = tree_leaves(run(*copies))
    for handle in handles:
        handle.remove()
    return [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]


def _jittering(model: nn.Module, size: float) -> list[Any]:
    """Hooks that move every layer's output by up to `size`, relative."""
    generator = torch.Generator().manual_seed(5)

    def move(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        noise = torch.rand(output.shape, generator=generator, dtype=output.dtype)
        return output * (1 + size * (2 * noise - 1))

    return [m.register_forward_hook(move) for m in model.modules() if not any(m.children())]
