"""`fold` under randomized statistics: the evaluation function must stay, in fp32 and in fp64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.zoo.build import DETECTION, Entry
from benchmarks.zoo.checks import Verdict
from benchmarks.zoo.measure import deviation
from nfnets.convert import convert
from nfnets.trace import is_batch_norm_like

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}


_DRAWS = 3
_STEADY = 1e-5


def same_function(entry: Entry, model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Verdict]:
    """Outputs of the folded model beside the BN model's, relative difference in the 2-norm, evaluation mode.

    Statistics that make the BN model's own fp32 outputs differ from its fp64 outputs by more than 1e-5 test rounding,
    not folding: they are drawn anew, three times at most. A model that amplifies rounding under all of them (a deep
    net with sharp attention, say) may differ by three times what its own rounding does. Of a detector, whose boxes
    are chosen by sorting, the backbone's features. No verdict in fp64 for a model that does not run in it.
    """
    inputs = tree_map_only(Tensor, lambda t: t[:2] if t.ndim > 3 else t, inputs)
    inputs = (inputs[0],) if entry.kind == DETECTION else inputs
    wide_inputs = tree_map_only(Tensor, _double, inputs)
    rounding, note, truth = 0.0, "", None
    for seed in range(_DRAWS):
        subject = _randomized(model, inputs, seed)
        before = _outputs(entry, subject, inputs)
        wide = copy.deepcopy(subject).double()
        try:
            truth = _outputs(entry, wide, wide_inputs)
        except Exception:  # fp32 constants inside the model (RAFT)
            break
        rounding = deviation(truth, before)
        if rounding <= _STEADY:
            break
    else:
        note = f"; the BN model's own rounding moves them by {rounding:.1e}"
    slack = 3 * min(rounding, 0.03)
    precision = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    folded = convert(subject, *inputs, method="fold", inplace=True)
    after = _outputs(entry, folded, inputs)
    found = {"same function 32": _verdict(before, after, max(TOLERANCES[torch.float32], slack), note)}
    if truth is not None:
        del subject, folded
        wide = convert(wide, *wide_inputs, method="fold", inplace=True)
        after = _outputs(entry, wide, wide_inputs)
        tolerance = max(TOLERANCES[torch.float64], slack * precision)
        found["same function 64"] = _verdict(truth, after, tolerance, note)
    return found


def _verdict(before: list[Tensor], after: list[Tensor], tolerance: float, note: str) -> Verdict:
    worst = deviation(before, after)
    level = max(float(t.abs().max()) for t in before)
    return Verdict(
        worst <= tolerance, f"differs by {worst:.1e} (relative), outputs up to {level:.1e}{note}", worst
    )


def _randomized(model: nn.Module, inputs: tuple[Any, ...], seed: int) -> nn.Module:
    subject = copy.deepcopy(model).eval()
    handles = randomizing(subject, torch.Generator().manual_seed(3 + seed))
    with torch.no_grad():
        subject(*tree_map_only(Tensor, torch.clone, inputs))
    for handle in handles:
        handle.remove()
    return subject


def randomizing(model: nn.Module, generator: torch.Generator) -> list[Any]:
    """Hooks that give every norm layer statistics, γ and β at random, when it first runs in evaluation mode.

    Means ±10^U(−6, 4), variances 10^U(−6, 4), one in ten exactly 0 and one in twenty subnormal; γ of either sign, one
    in ten 0; β in U(−½, ½). |γ| is drawn so that a channel's output, β aside, has a root mean square of ½ to 1½ on
    the example inputs: otherwise the products of a few layers leave fp32 and there is nothing to compare. A norm
    layer without γ gets statistics around those of its input.
    """
    handles = []
    for module in model.modules():
        if is_batch_norm_like(module):
            handle = module.register_forward_pre_hook(_once(generator))
            handles.append(handle)
    return handles


def _once(generator: torch.Generator) -> Any:
    done: list[bool] = []

    def hook(norm: Any, args: tuple[Any, ...]) -> None:
        if not done and norm.running_mean is not None:
            done.append(True)
            randomize_(norm, args[0], generator)

    return hook


@torch.no_grad()
def randomize_(norm: Any, x: Tensor, generator: torch.Generator) -> None:
    """Draw one norm layer's statistics, γ and β; see `randomizing`."""
    channels = len(norm.running_mean)
    uniform = lambda: torch.rand(channels, generator=generator, dtype=torch.float64)  # noqa: E731
    values = x.detach().double().transpose(0, 1).flatten(1)
    mean, variance = values.mean(1), values.var(1, correction=0)
    if getattr(norm, "weight", None) is None:
        norm.running_mean.copy_(mean + (uniform() - 0.5) * variance.sqrt())
        norm.running_var.copy_((variance + 1e-3) * 4 ** (2 * uniform() - 1))
        return
    sign = torch.where(uniform() < 0.5, -1.0, 1.0)
    centers = sign * 10 ** (10 * uniform() - 6)
    spreads = 10 ** (10 * uniform() - 6)
    kind = uniform()
    spreads[kind < 0.1] = 0.0
    norm.running_mean.copy_(centers)
    norm.running_var.copy_(spreads)
    norm.running_var[(kind > 0.95).to(norm.running_var.device)] = 1e-40  # subnormal in fp32
    spread = (norm.running_var.double() + norm.eps).sqrt()
    # A mean that all but equals a channel that is all but constant leaves the rounding of a difference, in any model.
    away = (variance + (mean - norm.running_mean.double()) ** 2).sqrt()
    norm.running_mean[away < 0.01 * mean.abs()] *= -1
    level = (variance + (mean - norm.running_mean.double()) ** 2).sqrt() / spread
    gamma = torch.where(uniform() < 0.5, -1.0, 1.0) * (0.5 + uniform()) / level.clamp_min(1e-6)
    gamma[uniform() < 0.1] = 0.0
    norm.weight.copy_(gamma)
    norm.bias.copy_(uniform() - 0.5)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@torch.no_grad()
def _outputs(entry: Entry, model: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    run, given = (model.backbone, (torch.stack(inputs[0]),)) if entry.kind == DETECTION else (model, inputs)
    copies = tree_map_only(Tensor, torch.clone, given)
    return [t for t in tree_leaves(run(*copies)) if isinstance(t, Tensor) and t.is_floating_point()]
