"""Layer-sequential unit-variance initialization in one forward pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.init.knob import Knob, is_weight_layer, knob, scaled_to
from nfnets.init.one_pass import Call, Rescale, Write, check, one_pass, transaction
from nfnets.init.orthogonal import orthonormal_rows
from nfnets.init.report import Report, Row
from nfnets.trace import Graph

Beside = Callable[[Write], Rescale]

_FROZEN = "requires_grad is False"
_log = logging.getLogger("nfnets")

_FUNCTIONAL = {"conv1d", "conv2d", "conv3d", "linear", "bilinear"}
_FUNCTIONAL |= {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_WITH_PARAMETER = {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"}


def lsuv_(
    model: nn.Module,
    *inputs: Any,
    target_std: float = 1.0,
    orthonormal: bool = True,
    per_channel: bool = False,
    strict: bool = True,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    targets: Mapping[str, float] | None = None,
    most: Mapping[str, float] | None = None,
    beside: Beside | None = None,
    **kwargs: Any,
) -> Report:
    """Scale every convolution and linear, in ONE forward pass, so that its output has unit variance.

    W ← c·W in execution order, with c > 0 the root of Var(c·z + b) = target_std², z the output less the bias b:

        c = (−Cov(z, b) + √(Cov(z, b)² − Var z · (Var b − target_std²))) / Var z,

    which is target_std / std(out) for a layer without bias. Variances are over the whole output tensor (batch,
    channels and space), as `torch.var` takes them. The hook returns the rescaled output, so that one pass gives what
    LSUV's loop of forward passes gives on a fixed batch.

    What is scaled is the weight, the `gain` of a standardized layer, the g of weight norm, the output projection of
    attention. Left alone and listed: layers whose parameter does not require gradients (`frozen`), dead and
    non-finite outputs and biases too large for any root (`skipped`), second calls and tied weights (`shared`),
    layers no call reached (`unreached`), functional convolutions and scripted modules (`invisible`). Biases,
    activations, norm layers, modes, buffers and devices are not touched. Under distributed training, call it on one
    rank and broadcast the parameters.

    Unit variance is not yet a healthy signal: the whole tensor's variance can be all mean shift between channels.
    The report shows the variance within channels and the squared channel mean apart; `per_channel=True` sets both.

    Args:
        model: the model, changed in place, where it is. The pass runs in the mode that the model is in: in training
            norm layers normalize by the batch and dropout drops (by masks from a key), as when training starts.
        *inputs: one training batch, as `model(*inputs)` takes it. A large one estimates the variances well.
        target_std: standard deviation of every layer's output.
        orthonormal: first replace every weight by a random orthonormal matrix (units × the rest), as the paper does.
            All-zero weights are left zero: Fixup and zero-initialized branches stay what they are.
        per_channel: scale and shift every output channel to mean 0 and standard deviation `target_std` of its own
            (weight norm's data-dependent initialization). A layer without bias keeps its means.
        strict: refuse a model with layers that cannot be scaled; otherwise leave those and list them as `refused`.
        generator: source of randomness of the orthonormal matrices; torch's global one by default.
        layers: paths of the layers to set; None for all. The others are left, and not in the report.
        targets: standard deviations of single layers, by path, instead of `target_std`.
        most: largest root mean squares of single layers, by path; a target that needs more is lowered to it.
        beside: for a conversion that sets further layers in the same pass: given the way to write a parameter, what
            to call with every module that has none inside.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per layer in execution order; `print` it for a table.

    Raises:
        UserError: no such layer, one under a parametrization other than weight norm, lazy or meta parameters, a
            forward that fails; the model is as before.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3))
        >>> x = torch.randn(16, 3, 8, 8)
        >>> report = lsuv_(model, x)
        >>> [f"{row.path} {row.action} {row.std:.3f}" for row in report]
        ['0 set 1.000', '2 set 1.000']
        >>> f"{model(x).std():.4f}"
        '1.0000'

    Paper: arXiv 1511.06422; per channel: arXiv 1602.07868 §3. Checked against PyPI `lsuv` 0.3.0 where that is right.
    """
    if not (isinstance(target_std, int | float) and 0 < target_std < math.inf):
        raise UserError(f"target_std={target_std}: expected a finite number above 0; pass target_std=1.0")
    check(model, inputs, kwargs)
    knobs, others = _find(model, per_channel, layers)
    if not knobs and not others:
        raise UserError(f"{type(model).__name__} has no convolution or linear layer: nothing to initialize")
    if strict and any(row.action == "refused" for row in others):
        listed = "; ".join(f"{row.path}: {row.reason}" for row in others if row.action == "refused")
        raise UserError(
            f"layers that cannot be scaled: {listed}. Remove the parametrization, "
            "or pass strict=False to leave them as they are"
        )
    with transaction() as write:
        if orthonormal:
            _orthonormalize(knobs, write, generator)
        aims = dict.fromkeys(knobs, float(target_std)) | dict(targets or {})
        scaler = _Scaler(knobs, aims, most or {}, per_channel, strict, write)
        rescale = scaler if beside is None else _either(scaler, beside(write))
        graph = one_pass(model, *inputs, select=partial(_seen, beside is not None), rescale=rescale, **kwargs)
        if not scaler.trials and not others and not _invisible(model, graph):
            raise UserError(
                f"{type(model).__name__}'s forward calls none of its {len(knobs)} layers: nothing to initialize"
            )
    report = Report(f"LSUV, target std {target_std:g}", _rows(model, graph, scaler, others))
    for row in report:
        if row.action == "skipped" or (row.action == "invisible" and layers is None):
            _log.warning("lsuv_: %s %s: %s", row.path, row.action, row.reason)
    return report


def _seen(others: bool, module: nn.Module) -> bool:
    return is_weight_layer(module) or (others and not any(module.children()))


def _either(scaler: _Scaler, further: Rescale) -> Rescale:
    return lambda call: scaler(call) if call.path in scaler.knobs else further(call)


_REASONS = (
    "",
    "its output is not finite",
    "dead: its output does not vary",
    "its bias alone varies more than the target: no weight reaches it",
    "the weight would overflow",
)


@dataclass(slots=True)
class _Trial:
    """One call of a layer. Statistics stay on the device until the pass is over."""

    path: str
    action: str
    reason: str
    before: Tensor
    """Total variance."""
    after: tuple[Tensor, Tensor, Tensor]
    """Total variance, mean variance within a channel, mean squared channel mean."""
    factor: Tensor = field(default_factory=lambda: torch.tensor(math.nan, device="cpu"))
    code: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))
    """Per unit, or for all: an index into `_REASONS`."""


class _Scaler:
    """The callback of the pass: measures each output, writes the knob, returns the rescaled output."""

    def __init__(
        self,
        knobs: dict[str, Knob],
        targets: Mapping[str, float],
        most: Mapping[str, float],
        per_channel: bool,
        strict: bool,
        write: Write,
    ):
        self.knobs = knobs
        self.targets = targets
        self.most = most
        self.per_channel = per_channel
        self.strict = strict
        self.write = write
        self.owner: dict[int, str] = {}
        self.trials: list[_Trial] = []

    def __call__(self, call: Call) -> Tensor | None:
        output, path = call.output, call.path
        layer = self.knobs.get(path)
        if layer is None or not output.is_floating_point() or output.numel() < 2:
            return None
        mean, var = channel_moments(output, layer.channel_dim)
        stats = _summary(mean, var, output.numel())
        first = self.owner.setdefault(id(layer.parameter), path)
        if first != path or call.index > 0:
            self.trials.append(_Trial(path, "shared", f"set by the first call, of {first}", stats[0], stats))
            return None
        if not layer.parameter.requires_grad:
            self.trials.append(_Trial(path, "frozen", _FROZEN, stats[0], stats))
            return None
        bias = layer.effective_bias()
        bias = mean.new_zeros(()) if bias is None else bias.to(mean.dtype)
        target: Any = self.targets[path]
        if path in self.most:
            share = (stats[0] / (stats[1] + stats[2])).sqrt()  # std over root mean square: scaling leaves it
            target = (share * self.most[path]).clamp(max=target)
        noise = 4 * torch.finfo(output.dtype).eps * mean.abs()
        if self.per_channel:
            factor, code = _per_channel_factor(var, noise, output.numel() // mean.numel(), target)
        else:
            factor, code = _whole_factor(mean - bias, var, bias, noise.amax(), output.numel(), target)
        old = [
            p.detach().clone() for p in (layer.parameter, layer.bias) if p is not None and not layer.trusted
        ]
        factor, code = self._scale(layer, factor, code)
        shift = None if layer.bias is None else (1 - factor) * bias
        if self.per_channel and layer.bias is not None and layer.bias.requires_grad:
            moved = torch.where(code == 0, (bias - mean) * factor, bias)
            shift = moved - factor * bias
            self.write(layer.bias, moved if layer.bias_factor is None else moved / layer.bias_factor)
        replaced = scaled_to(output, factor, shift, layer.channel_dim)
        if not layer.trusted and not self._follows(call, replaced):
            self.write(layer.parameter, old[0])
            if layer.bias is not None:
                self.write(layer.bias, old[1])
            self.trials.append(
                _Trial(path, "refused", "its output does not follow its weight", stats[0], stats)
            )
            return None
        new_mean = mean * factor + (0 if shift is None else shift)
        after = _summary(new_mean, var * factor.square(), output.numel())
        self.trials.append(_Trial(path, "set", "", stats[0], after, factor.mean(), code))
        return replaced

    def _scale(self, layer: Knob, factor: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Write the knob; where it would overflow, leave it."""
        old = layer.parameter.detach()
        new = (old.to(factor.dtype) * layer.per_unit(factor)).to(old.dtype)
        code = torch.where((code == 0) & ~torch.isfinite(new).all(), 4, code)
        factor = torch.where(code == 0, factor, 1)
        self.write(layer.parameter, torch.where(layer.per_unit(code == 0), new, old))
        return factor, code

    def _follows(self, call: Call, expected: Tensor) -> bool:
        """A subclass with a forward of its own is run again: does its output follow its weight?"""
        again = call.rerun()
        scale = expected.float().std()
        tolerance = 0.02 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3
        same = again.shape == expected.shape and (again - expected).float().std() <= tolerance * scale
        if bool(same) or not bool(torch.isfinite(scale)):
            return True
        if self.strict:
            raise UserError(
                f"{call.path} ({type(call.module).__name__}) does not follow its weight: its output is not c times as "
                "large for a c times larger weight; nothing was changed, freeze it (requires_grad_(False)) or pass "
                "strict=False to leave it out"
            )
        return False


def channel_moments(output: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, accumulated in at least fp32.

    Two plain reductions over centered values: torch's var_mean is ten times slower on a CPU.
    """
    x = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    dim = x.ndim + channel_dim
    others = tuple(d for d in range(x.ndim) if d != dim)
    if not others:
        return x, torch.zeros_like(x)
    mean = x.mean(others, keepdim=True)
    rest = x - mean
    squares = torch.linalg.vector_norm(rest, dim=others[1:]).square().sum(0) if others[1:] else None
    if squares is None:
        squares = torch.linalg.vector_norm(rest, dim=others).square()
    return mean.flatten(), squares / (x.numel() // x.shape[dim])


def _summary(mean: Tensor, var: Tensor, numel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Total variance (as `torch.var`), mean variance within a channel, mean squared channel mean."""
    within = var.mean()
    total = (within + mean.var(correction=0)) * (numel / max(numel - 1, 1))
    return total, within, mean.square().mean()


def _whole_factor(
    mean: Tensor, var: Tensor, bias: Tensor, noise: Tensor, numel: int, target: Any
) -> tuple[Tensor, Tensor]:
    """c of Var(c·z + b) = target², from z's moments per channel, and a code where there is none."""
    unbiased = numel / (numel - 1)
    centered, offset = mean - mean.mean(), bias - bias.mean()
    var_z = (var.mean() + centered.square().mean()) * unbiased
    cov, var_b = (centered * offset).mean() * unbiased, offset.square().mean() * unbiased
    root = cov.square() - var_z * (var_b - target**2)
    factor = (root.clamp_min(0).sqrt() - cov) / var_z
    code = torch.where((root >= 0) & (factor > 0), 0, 3)
    code = torch.where((var_z > noise.square()) & torch.isfinite(factor), code, 2)
    return factor, torch.where(torch.isfinite(var_z + cov), code, 1)


def _per_channel_factor(var: Tensor, noise: Tensor, count: int, target: Any) -> tuple[Tensor, Tensor]:
    """target / std of every channel, and a code where there is none."""
    std = (var * (count / max(count - 1, 1))).sqrt()
    factor = target / std
    code = torch.where((std > noise) & torch.isfinite(factor), 0, 2)
    return factor, torch.where(torch.isfinite(std), code, 1)


def _find(
    model: nn.Module, per_channel: bool, layers: Collection[str] | None
) -> tuple[dict[str, Knob], list[Row]]:
    """The layers that can be scaled, and a row for each that cannot."""
    knobs: dict[str, Knob] = {}
    others: list[Row] = []
    for path, module in model.named_modules():
        if not is_weight_layer(module) or (layers is not None and path not in layers):
            continue
        found = knob(module)
        if isinstance(found, Knob) and per_channel and found.unit_shape is None:
            found = "its weight norm has no g per output channel; use per_channel=False"
        if isinstance(found, Knob):
            knobs[path] = found
        elif any(parameter.requires_grad for parameter in module.parameters()):
            others.append(Row(path, "refused", found))
        else:
            others.append(Row(path, "frozen", _FROZEN))
    return knobs, others


def _orthonormalize(knobs: dict[str, Knob], write: Write, generator: torch.Generator | None) -> None:
    done: set[int] = set()
    for layer in knobs.values():
        weight = layer.direction
        trainable = weight.requires_grad and layer.parameter.requires_grad
        if id(weight) in done or not trainable or not weight.detach().any():
            continue
        done.add(id(weight))
        rows = orthonormal_rows(layer.units, weight.numel() // layer.units, weight, generator)
        write(weight, layer.from_rows(rows).to(weight.dtype))


def _rows(model: nn.Module, graph: Graph, scaler: _Scaler, others: list[Row]) -> list[Row]:
    rows = [_row(trial) for trial in scaler.trials] + others
    reached = {row.path for row in rows}
    unreached = [path for path in scaler.knobs if path not in reached]
    rows += [Row(path, "unreached", "not called, or with an empty output") for path in unreached]
    return rows + _invisible(model, graph)


def _invisible(model: nn.Module, graph: Graph) -> list[Row]:
    """Weights that no hook sees: read by functions, or inside scripted modules."""
    rows = []
    for node in graph.nodes:
        product = node.name in _FUNCTIONAL or (node.name in _WITH_PARAMETER and node.params)
        if node.kind == "function" and product:
            of = ", ".join(node.params) or "a computed weight"
            rows.append(Row(node.path, "invisible", f"functional {node.name} of {of}: no module to scale"))
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    for path in scripted:
        within = any(path.startswith(f"{outer}.") for outer in scripted)
        if not within and any(True for _ in model.get_submodule(path).parameters()):
            rows.append(Row(path, "invisible", "scripted: its layers cannot be seen"))
    return rows


def _row(trial: _Trial) -> Row:
    before, total, within, mean_sq = (float(t) for t in (trial.before, *trial.after))
    measured: dict[str, Any] = {
        "std_before": math.sqrt(before) if before >= 0 else math.nan,
        "std": math.sqrt(total) if total >= 0 else math.nan,
        "channel_var": within,
        "channel_mean_sq": mean_sq,
    }
    left = trial.code != 0
    share = float(left.float().mean())
    reason = "" if share == 0 else _REASONS[int(trial.code[left].min())]
    if share == 1:
        return Row(trial.path, "skipped", reason, **measured)
    if share > 0:
        reason = f"{share:.0%} of its channels are left: {reason}"
    return Row(trial.path, trial.action, trial.reason or reason, float(trial.factor), **measured)
