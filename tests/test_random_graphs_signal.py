"""What holds of tracer, probe, LSUV and AGC on any network: random graphs of every kind of block (hypothesis).

Everything is held against the definition, by ordinary forward hooks and loops.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_graphs import Block, Net, Unit, build, inputs, leaves, nets
from random_modules import Residual
from test_random_graphs import GRAPHS, run, same, state
from torch import Tensor, nn

from nfnets import attach_agc, clip_grad_agc_, probe, profile
from nfnets.init import lsuv_
from nfnets.noise import is_noise
from nfnets.trace import is_atomic, trace

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


def watched(model: nn.Module, look: Any) -> list[Any]:
    """`look(path, output)` after every call of an atomic module, before anything can overwrite the output."""

    def hook_for(path: str) -> Any:
        def hook(module: nn.Module, _: Any, out: Tensor) -> None:  # what it returned would be the output
            look(path, out.detach().clone())

        return hook

    return [m.register_forward_hook(hook_for(path)) for path, m in model.named_modules() if is_atomic(m)]


@settings(GRAPHS)
@given(nets)
def test_the_tracer_sees_every_call_and_changes_nothing(spec: Net) -> None:
    model = build(spec)
    calls: list[tuple[str, Tensor]] = []
    twin = copy.deepcopy(model)
    watched(twin, lambda path, out: calls.append((path, out)))
    expected = run(spec, twin)
    traced: list[tuple[str, Tensor]] = []
    last: dict[int, Tensor] = {}

    def visit(node: Any, out: Tensor) -> None:
        last[node.index] = out.clone()
        if node.kind == "module":
            traced.append((node.path, last[node.index]))

    before = state(model)
    torch.manual_seed(2)
    random = torch.get_rng_state()
    given = inputs(spec)
    graph = trace(model, *given, visit=visit)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(before, state(model))
    assert all(map(torch.equal, leaves(given), leaves(inputs(spec))))
    assert [path for path, _ in traced] == [path for path, _ in calls]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(traced, calls, strict=True))
    assert any(torch.equal(expected[0], last[index]) for index in graph.outputs)
    for node in graph.nodes:
        assert all(source < node.index for source in node.inputs)
        assert node.shape == last[node.index].shape


@settings(GRAPHS)
@given(nets)
@example(
    Net(
        blocks=(
            Block(kind="residual", parts=(Unit(affine=False), Unit(affine=False)), shortcut="projection"),
        )
    )
)
def test_the_tracer_finds_the_residual_joins_that_were_built(spec: Net) -> None:
    """The side with more layers is the branch. As many on both: it is a sum of parallel paths, none a shortcut."""
    model = build(spec)
    expected: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    seen: list[list[str]] = []

    def count(module: nn.Module, _: Any, out: Any) -> None:
        if seen and (isinstance(module, WEIGHTED) or any(True for _ in module.parameters(recurse=False))):
            for each in seen:
                each.append(paths[module])

    def enter(module: nn.Module, _: Any) -> None:
        seen.append([])

    def leave(module: Any, _: Any, out: Any) -> None:
        ran = seen.pop()
        side = f"{paths[module]}.shortcut."
        shortcut = tuple(path for path in ran if path.startswith(side))
        branch = tuple(path for path in ran if path.startswith(f"{paths[module]}.parts."))
        sides = sorted((branch, shortcut), key=len, reverse=True)
        expected.append((paths[module], sides[0], sides[1]))

    twin = build(spec)
    paths = {module: path for path, module in twin.named_modules()}
    for module in twin.modules():
        if isinstance(module, Residual):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        elif is_atomic(module):
            module.register_forward_hook(count)
    run(spec, twin)
    graph = trace(model, *inputs(spec))
    blocks = {path for path, module in model.named_modules() if isinstance(module, Residual)}
    found = []
    for join in graph.joins:
        path = graph.nodes[join.node].path
        if path in blocks:
            sides = (join.branch_nodes, join.shortcut_nodes)
            found.append((path, *(tuple(graph.nodes[i].path for i in side) for side in sides)))
        assert graph.depends(join.branch, join.split)
        assert graph.depends(join.shortcut, join.split)
        assert not graph.depends(join.shortcut, join.branch_end) or join.branch_end == join.split
    equal = {path for path, *sides in expected if len(sides[0]) == len(sides[1])}
    assert sorted(each for each in found if each[0] not in equal) == sorted(
        each for each in expected if each[0] not in equal
    )


def close_moments(point: Any, out: Tensor) -> None:
    """Against the definition, channel by channel in double precision."""
    wide = out.double().movedim(1, 0).flatten(1)
    mean, var = wide.mean(1), wide.var(1, correction=0)
    size = float(wide.square().mean()) + 1e-30
    assert point.var == pytest.approx(float(var.mean()), rel=1e-3, abs=1e-5 * size), point.name
    assert point.mean_sq == pytest.approx(float(mean.square().mean()), rel=1e-3, abs=1e-5 * size), point.name
    assert point.total_mean == pytest.approx(float(wide.mean()), rel=1e-3, abs=1e-4 * math.sqrt(size)), (
        point.name
    )
    assert point.total_var == pytest.approx(float(wide.var(correction=0)), rel=1e-3, abs=1e-5 * size), (
        point.name
    )
    assert point.min == pytest.approx(float(wide.min()), rel=1e-5, abs=1e-6), point.name
    assert point.max == pytest.approx(float(wide.max()), rel=1e-5, abs=1e-6), point.name


@settings(GRAPHS)
@given(nets)
@example(
    Net(blocks=(Block(parts=(Unit(extra="shuffle"),)),), head="none", rank=3)
)  # as many channels as columns
@example(Net(blocks=(Block(kind="dense"), Block(kind="split"), Block(parts=(Unit(order="act conv norm"),)))))
def test_the_probe_measures_by_the_definition(spec: Net) -> None:
    model = build(spec)
    names: dict[str, int] = {}
    outputs: dict[str, Tensor] = {}

    def look(path: str, out: Tensor) -> None:
        names[path] = names.get(path, 0) + 1
        outputs[path if names[path] == 1 else f"{path}#{names[path]}"] = out

    handles = watched(model, look)
    with probe(model, warn=False) as p:
        run(spec, model)
    for handle in handles:
        handle.remove()
    measured = [point for point in p.report().points if point.name in outputs]
    assert {point.name for point in measured} >= {
        name for name in outputs if isinstance(model.get_submodule(name.partition("#")[0]), WEIGHTED)
    }
    for point in measured:
        assert point.shape == outputs[point.name].shape
        close_moments(point, outputs[point.name])


@settings(GRAPHS)
@given(spec=nets, frozen=st.booleans())
def test_training_under_a_probe_is_bitwise_the_same(spec: Net, frozen: bool) -> None:
    results = []
    for probed in (False, True):
        model = build(spec)
        if frozen:
            next(model.parameters()).requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        p = probe(model, every=2, backward=True, updates=True, warn=False)
        if probed:
            p.__enter__()
        steps = []
        for _ in range(3):
            out = run(spec, model, grad=True)
            optimizer.zero_grad()
            sum(t.square().mean() for t in out).backward()  # type: ignore[union-attr]
            optimizer.step()
            steps += [*out, *(g.grad for g in model.parameters() if g.grad is not None)]
        if probed:
            p.__exit__(None, None, None)
            assert p.report().steps == (0, 2)
        assert "forward" not in vars(model)
        found = {**state(model), "random": torch.get_rng_state().tolist()}
        found["modules"] = [module.training for module in model.modules()]
        found["parameters"] = [q.requires_grad for q in model.parameters()]
        results.append(([t.detach().clone() for t in steps], found))
    (steps, plain), (others, probed_state) = results
    assert all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(steps, others, strict=True))
    assert same(plain, probed_state) or any(bool(v.isnan().any()) for v in plain["values"].values())


@settings(GRAPHS)
@given(spec=nets, backward=st.booleans())
@example(
    spec=Net(blocks=(Block(kind="residual", parts=(Unit(extra="dropout"),), add="in place"),)), backward=True
)  # writes over what dropout puts out, which switched off is what a ReLU has kept
def test_a_profile_changes_nothing_and_predicts_everything(spec: Net, backward: bool) -> None:
    model = build(spec)
    run(spec, model, grad=True)[0].sum().backward()
    before, gradients = state(model), [p.grad for p in model.parameters()]
    values = [None if g is None else g.clone() for g in gradients]
    given, random = inputs(spec), torch.get_rng_state()
    report = profile(model, *given, backward=backward)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(before, state(model))
    assert all(map(torch.equal, leaves(given), leaves(inputs(spec))))
    for p, gradient, value in zip(model.parameters(), gradients, values, strict=True):
        assert p.grad is gradient
        assert value is None or torch.equal(p.grad, value)
    weighted = [point for point in report.points if point.kind in ("conv", "linear", "norm")]
    assert all(point.predicted_var is not None and math.isfinite(point.predicted_var) for point in weighted)
    assert all((point.grad_var is not None) == backward for point in weighted if point.role != "input")


@settings(GRAPHS)
@given(spec=nets, orthonormal=st.booleans(), per_channel=st.booleans())
def test_lsuv_gives_unit_variance_or_says_where_not(spec: Net, orthonormal: bool, per_channel: bool) -> None:
    model = build(spec)
    for module in filter(is_noise, model.modules()):
        module.p = 0.0  # type: ignore[assignment]  # with masks: tests/test_noise.py
    before = state(model)
    torch.manual_seed(4)
    report = lsuv_(model, *inputs(spec), orthonormal=orthonormal, per_channel=per_channel, strict=False)
    now = state(model)
    assert all(before[key] == now[key] for key in before if key != "values")
    layers = {path for path, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)}
    assert {row.path for row in report} == layers
    tensors = [module.weight for path in layers if (module := model.get_submodule(path))]
    tensors += [model.get_submodule(path).bias for path in layers if per_channel]
    written = {id(t) for t in tensors}
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) not in written:
            assert torch.equal(value, before["values"][key]), key
    first: dict[str, Tensor] = {}
    twin = copy.deepcopy(model)
    watched(twin, first.setdefault)
    run(spec, twin)
    for row in report:
        if row.action != "set" or row.reason:
            assert row.action != "set" or "of its channels are left" in row.reason
            continue
        out = first[row.path].double()
        assert float(out.std()) == pytest.approx(row.std, rel=2e-3), row
        if not per_channel:
            assert row.std == pytest.approx(1, rel=2e-3), row
            continue
        wide = out.movedim(1, 0).flatten(1)
        assert wide.std(1).tolist() == pytest.approx([1] * len(wide), rel=2e-3), row


def clipped(
    module: nn.Module, name: str, parameter: Tensor, clipping: float, eps: float
) -> tuple[Tensor, int, int]:
    """One unit after the other, in double precision: the gradient, how many units were clipped, how many there are."""
    weight, gradient = parameter.detach().double(), parameter.grad
    assert gradient is not None
    new = gradient.detach().double().clone()
    if sum(n != 1 for n in weight.shape) <= 1:
        units: list[tuple[Any, ...]] = [(...,)]
    elif isinstance(module, nn.modules.conv._ConvTransposeNd) and name == "weight":
        size = len(weight) // module.groups
        units = [
            (slice(g * size, (g + 1) * size), out)
            for g in range(module.groups)
            for out in range(weight.shape[1])
        ]
    else:
        units = [(row,) for row in range(len(weight))]
    count = 0
    for unit in units:
        limit = clipping * max(float(weight[unit].norm()), eps)
        norm = float(new[unit].norm())
        if norm > limit:
            new[unit] *= limit / max(norm, 1e-6)
            count += 1
    return new, count, len(units)


@settings(GRAPHS)
@given(spec=nets, clipping=st.sampled_from((0.003, 0.03, 0.3)), attached=st.booleans())
def test_agc_clips_unit_by_unit(spec: Net, clipping: float, attached: bool) -> None:
    model = build(spec).train()
    sum(t.square().sum() for t in run(spec, model, grad=True)).backward()  # type: ignore[union-attr]
    expected: dict[str, Tensor] = {}
    numbers = [0, 0]
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.grad is not None:
                key = f"{path}.{name}"
                expected[key], count, units = clipped(module, name, parameter, clipping, 1e-3)
                numbers = [numbers[0] + count, numbers[1] + units]
    if attached:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        handle = attach_agc(optimizer, model, clipping=clipping, exclude=None)
        optimizer.step()
        share = float(handle.stats.fraction)
    else:
        share = float(clip_grad_agc_(model, clipping=clipping))
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(expected[key].abs().max()) + 1e-30
            torch.testing.assert_close(parameter.grad.double(), expected[key], rtol=1e-4, atol=1e-5 * scale)
    # A unit may lie at its limit to the last digit.
    assert share == pytest.approx(numbers[0] / numbers[1], abs=2 / numbers[1])
