"""One call: how the signal propagates through one model, or through several side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nfnets.errors import UserError
from nfnets.noise import drops, keyed, silenced
from nfnets.preserve import check_ordinary
from nfnets.signal.collect import Pass, Weights, branch_ends, gather, holders, norms, theory, weights
from nfnets.signal.facts import facts
from nfnets.signal.notes import empty_input, of_graph, of_model, of_output, of_patterns, of_points
from nfnets.signal.points import patterns, places, unmatched, unwrapped
from nfnets.signal.report import Point, SignalReport
from nfnets.signal.rows import points as rows_to_points
from nfnets.signal.rules import Rule, needs_backward
from nfnets.trace import Graph, is_batch_norm_like, preserved

Loss = Callable[[Any], Tensor]


def profile(
    model: nn.Module | Mapping[str, nn.Module],
    *inputs: Any,
    backward: bool = False,
    loss: Loss | None = None,
    include: str | Collection[str] = (),
    exclude: str | Collection[str] = (),
    training: bool | None = None,
) -> SignalReport:
    """Measures how the signal propagates through a model, in a forward pass that changes nothing.

        squared mean = mean_c(E[x_c]²)    variance = mean_c(Var[x_c])    residual = variance at the branch end

    Normalization layers use batch statistics (unless frozen in a model that is in `train` mode); dropout and
    stochastic depth are off. Where a model has some, a second pass with masks from a key fills `training_var`: what
    training sees, which the rule `noise` judges. Modes, buffers, random state, gradients and the inputs are left as
    they were.

    Args:
        model: a model, or several by name to compare.
        *inputs: what its forward takes; 16 samples or more give good estimates.
        backward: also the gradients, of `loss` or of the output times unit Gaussian noise.
        loss: makes a 0-dim tensor of the output; implies `backward`.
        include: glob pattern(s) of further points (functions such as `layer1.0.mul`); what matches nothing is noted.
        exclude: glob pattern(s) of points to leave out.
        training: whether to measure `training_var`; None: where the model has a module for dropout or stochastic depth
            that is not off, True: where its forward drops by itself, too.

    Returns:
        A `SignalReport`.

    Raises:
        UserError: the model rejects the inputs, nothing can be measured, or there is no gradient.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = profile(net, torch.randn(8, 3, 16, 16))
        >>> [(p.name, p.kind) for p in report.points]
        [('input', 'input'), ('0', 'conv'), ('1', 'norm'), ('2', 'activation')]
        >>> round(report["1"].var, 2)
        1.0

    Paper: arXiv 2101.08692 §3. Definitions and positions checked against deepmind-research `nfnets`.
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    _reject(models, inputs)
    models = {n or type(unwrapped(m)).__name__: unwrapped(m) for n, m in models.items()}
    report = SignalReport([], meta=_meta(inputs))
    said: dict[str, list[str]] = {}
    for name, each in models.items():
        points, notes = _profile(
            name, each, inputs, backward or loss is not None, loss, patterns(include), patterns(exclude)
        )
        if drops(each) if training is None else training:
            try:
                points = _in_training(each, inputs, points, (patterns(include), patterns(exclude)))
            except UserError as error:
                if training:
                    raise
                notes.append(f"training_var was not measured: {error}")
        report.points += points
        for note in notes:
            said.setdefault(note, []).append(name)
    report.notes += [n if len(ms) == len(models) else f"{', '.join(ms)}: {n}" for n, ms in said.items()]
    return report


def assert_signal(
    model: nn.Module, *inputs: Any, rules: list[str | Rule] | None = None, **options: Any
) -> None:
    """Fails with the offending layers and a remedy when a model's signal is not healthy: for test suites.

    Args:
        model: the model.
        *inputs: what its forward takes.
        rules: names or `Rule` objects; the default rules when omitted.
        **options: as `profile`; `backward` where a rule that was named judges gradients.

    Raises:
        AssertionError: a rule is broken.
        UserError: as `profile`.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
        >>> assert_signal(net, torch.randn(32, 64))
    """
    options.setdefault("backward", needs_backward(rules))
    verdict = profile(model, *inputs, **options).check(rules)
    if not verdict:
        raise AssertionError(str(verdict))


def _reject(models: Mapping[str, Any], inputs: tuple[Any, ...]) -> None:
    if not models:
        raise UserError("profile of no model: expected a model or a dict of models")
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            which = f"{name!r}, " if name else ""
            raise UserError(f"profile of {which}a {type(model).__name__}: expected an nn.Module")
        if isinstance(model, nn.DataParallel):
            raise UserError(
                "DataParallel runs replicas in threads that no tracer sees: profile model.module instead"
            )
        if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
            raise UserError(
                f"{name or type(model).__name__} has no values (meta device): materialize and initialize it first"
            )
        check_ordinary(model)
    if nothing := empty_input(inputs):
        raise UserError(nothing)


def _meta(inputs: tuple[Any, ...]) -> dict[str, Any]:
    shapes = [list(t.shape) for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    return {"inputs": shapes, "torch": str(torch.__version__)}


def _in_training(
    model: nn.Module,
    inputs: tuple[Any, ...],
    points: list[Point],
    chosen: tuple[Collection[str], Collection[str]],
) -> list[Point]:
    """The points with their variance in a pass that drops."""
    noisy, _ = _profile("", model, inputs, False, None, *chosen, modes=_training_modes)
    variances = {p.name: p.var for p in noisy}
    return [replace(p, training_var=variances.get(p.name)) for p in points]


@contextlib.contextmanager
def _training_modes(model: nn.Module) -> Iterator[None]:
    """As in training, with masks from a key; inside `preserved`, which puts the modes back."""
    with keyed(model):
        if not model.training:
            model.train()
        yield


@contextlib.contextmanager
def _measuring_modes(model: nn.Module) -> Iterator[None]:
    """Batch statistics as in training, everything random off; inside `preserved`, which puts the modes back."""
    root = model.training
    with silenced(model):
        for module in model.modules():
            module.training = is_batch_norm_like(module) and (module.training or not root)
        yield


def _own(inputs: tuple[Any, ...], differentiable: bool) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Copies, so that a model whose first operation is in place cannot write into the caller's batch.

    Also the leaves that gradients end in: they let gradients through models whose weights are all frozen.
    """
    leaves: list[Tensor] = []

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().clone()
        if not (differentiable and leaf.is_floating_point()):
            return leaf
        leaves.append(leaf.requires_grad_())
        return (
            leaf.clone()
        )  # not the leaf: an in-place operation on a leaf that requires a gradient is refused

    return tree_map(copy, inputs), leaves


def _profile(
    name: str,
    model: nn.Module,
    inputs: tuple[Any, ...],
    backward: bool,
    loss: Loss | None,
    include: Collection[str],
    exclude: Collection[str],
    modes: Callable[[nn.Module], contextlib.AbstractContextManager[None]] | None = None,
) -> tuple[list[Point], list[str]]:
    measured = Pass(backward)
    with preserved(model), (modes or _measuring_modes)(model), torch.inference_mode(False):
        with torch.set_grad_enabled(backward):
            own, leaves = _own(inputs, backward)
            with measured.recording(model) as recorder:
                for leaf in tree_leaves(own):
                    if isinstance(leaf, Tensor):
                        recorder.record("input", "input", (), (), leaf, path="")
                output = _forward(model, own)
                graph = recorder.graph(output)
        measured.settle()
        found = places(graph, measured.outputs, include, exclude)
        _reject_nothing(name, output, graph, [p for p in found if p.kind != "input"])
        weight = weights(holders(graph, found))
        lengths = norms(weight)
        gradients = _backward(name, output, loss, weight, leaves) if backward else {}
        rows = gather(
            measured,
            found,
            branch_ends(graph),
            theory=theory(measured, graph, weight, lengths),
            weight_norms=lengths,
            weight_gradients=norms(gradients),
            layers=facts(graph, weight),
        )
        points = rows_to_points(rows, name)
    missed = unmatched(graph, measured.outputs, include, exclude)
    return points, [
        *of_patterns(missed),
        *of_output(output),
        *of_graph(graph),
        *of_model(model, _samples(inputs), True),
        *of_points(points),
    ]


def _samples(inputs: tuple[Any, ...]) -> int:
    first = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), None)
    return 0 if first is None else len(first)


def _forward(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    try:
        return model(*inputs)
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        given = ", ".join(
            f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tree_leaves(inputs) if isinstance(t, Tensor)
        )
        raise UserError(
            f"the model's forward fails on inputs {given or 'of no tensor'}: {reason}; pass inputs (and a batch of "
            "two or more, for batch statistics) that model(*inputs) accepts"
        ) from error


def _reject_nothing(name: str, output: Any, graph: Graph, found: list[Any]) -> None:
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
        raise UserError(
            f"{name} returns {type(output).__name__}, no tensor: expected a tensor or a structure of some"
        )
    if not found:
        raise UserError(
            f"{name} has no point to measure among {len(graph)} recorded calls: expected a convolution, linear, "
            "norm, activation or residual join with a floating-point output"
        )


def _backward(
    name: str, output: Any, loss: Loss | None, weight: Weights, leaves: list[Tensor]
) -> dict[int, list[Tensor]]:
    """Runs the backward pass for its tensor hooks; returns the weights' gradients and writes none of them."""
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UserError("loss(output) must be one number in a tensor, such as a mean")
        outputs, seeds = [value], [torch.ones_like(value)]
    else:
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    pairs = [(t, s) for t, s in zip(outputs, seeds, strict=True) if t.requires_grad]
    if not pairs:
        raise UserError(f"{name} has no differentiable output: expected floating point; use backward=False")
    trained = {id(w): w for held in weight.values() for w in held if w.requires_grad}
    ends = [*trained.values(), *leaves]
    found = torch.autograd.grad([t for t, _ in pairs], ends, [s for _, s in pairs], allow_unused=True)
    by_id = dict(zip(trained, found, strict=False))
    gradients = {i: [g for w in held if (g := by_id.get(id(w))) is not None] for i, held in weight.items()}
    return {i: found for i, found in gradients.items() if found}
