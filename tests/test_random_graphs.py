"""What holds for every conversion method on any network: random graphs of every kind of block (hypothesis).

`make test` draws 10 networks a test, `make soak` 1,000 other ones.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st
from random_graphs import Block, Net, Unit, build, inputs, leaves, nets
from random_modules import Steps
from torch import Tensor, nn

from nfnets import verify
from nfnets.convert import ConversionError, bake, convert, list_methods, plan
from nfnets.convert.methods.ghost_bn import GhostBatchNorm
from nfnets.errors import UserError
from nfnets.layers import Scale, _ScaledStd
from nfnets.marked import measured_constant
from nfnets.noise import is_noise
from nfnets.trace import is_batch_norm_like, preserved

GRAPHS = settings.get_profile("graphs")
METHODS = sorted(list_methods())
methods = st.sampled_from(METHODS)
# Why a method may refuse a network that it is not for. `nf`, `fold`, `lsuv`, `fixed_variance`, `ghost_bn` never do.
REFUSALS = {
    **dict.fromkeys(
        ("fixup", "skipinit"), "residual branch|both inside a branch and at the end|scalar has no place"
    ),
    **dict.fromkeys(("gn", "ln", "ws_gn", "evonorm_s0", "bcn"), "too few to normalize"),
}


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a look at a model must leave bitwise."""
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "modules": {path: (id(module), module.training) for path, module in model.named_modules()},
        "parameters": {
            name: (id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()
        },
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "text": repr(model),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    values, now = before["values"], after["values"]
    equal = list(values) == list(now) and all(torch.equal(values[key], now[key]) for key in values)
    return equal and all(before[key] == after[key] for key in before if key != "values")


def converted(spec: Net, method: str, model: nn.Module, **options: Any) -> nn.Module | None:
    """The converted network; None if the method is right to refuse it."""
    given_as: dict[str, Any] = {"kwargs": {"x": inputs(spec)[0]}} if spec.io == "keyword" else {}
    positional = () if given_as else inputs(spec)
    if method == "nf":  # of itself it leaves channels alone on so few samples
        options = {"channelwise": len(spec.blocks) % 2 == 1} | options
    torch.manual_seed(1)
    try:
        return convert(model, *positional, method=method, **given_as, **options)
    except UserError as error:
        reasons = (
            [row.reason for row in error.plan.refused] if isinstance(error, ConversionError) else [str(error)]
        )
        expected = pytest.RaisesExc(UserError, match=REFUSALS.get(method, "(?!)"))
        for reason in reasons:
            assert reason
            assert "\n" not in reason
            assert expected.matches(UserError(reason)), f"{method} refuses: {reason}"
        event(f"{method} refuses")
        return None


def run(spec: Net, model: nn.Module, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(2)
    with torch.set_grad_enabled(grad):
        return leaves(model(*inputs(spec)))


def close(a: list[Tensor], b: list[Tensor], rtol: float) -> bool:
    """Each tensor by its 2-norm."""
    pairs = list(zip(a, b, strict=True))
    return all(float((x - y).norm()) <= rtol * float(x.norm()) + 1e-30 for x, y in pairs)


def gradients(spec: Net, model: nn.Module) -> dict[str, Tensor | None]:
    model.train().zero_grad()
    out = run(spec, model, grad=True)
    sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() + t.sum() for t in out).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters()}


@settings(GRAPHS)
@given(spec=nets, method=methods, inplace=st.booleans())
def test_every_method_on_any_network(spec: Net, method: str, inplace: bool) -> None:
    model = build(spec)
    target = copy.deepcopy(model)
    before = state(target)
    new = converted(spec, method, target, inplace=inplace)
    if new is None or not inplace:
        assert same(before, state(target))
    if new is None:
        return
    assert (new is target) == inplace
    only_norm_layers_went(model, new, method)
    again = converted(spec, method, new)
    assert again is not None
    assert same(without_ids(state(new)), without_ids(state(again)))
    nothing_is_overwritten(spec, model, new)
    it_trains_and_samples_do_not_meet(spec, model, new, method)
    it_can_be_copied_and_saved(spec, new, method)


def only_norm_layers_went(model: nn.Module, new: nn.Module, method: str) -> None:
    left = [module for module in new.modules() if is_batch_norm_like(module)]
    assert all(isinstance(module, GhostBatchNorm) for module in left)
    assert bool(left) == (method == "ghost_bn" and any(map(is_batch_norm_like, model.modules())))
    assert type(new) is type(model)
    found = dict(new.named_modules(remove_duplicate=False))
    gone = set()
    for path, module in model.named_modules(remove_duplicate=False):
        assert found[path].training == module.training
        if is_batch_norm_like(module) or isinstance(found[path], nn.Identity):  # an activation in EvoNorm
            gone |= {f"{path}.{name}" for name in module.state_dict()}
    assert set(model.state_dict()) - gone <= set(new.state_dict())


def it_trains_and_samples_do_not_meet(spec: Net, model: nn.Module, new: nn.Module, method: str) -> None:
    had, has = (gradients(spec, copy.deepcopy(each)) for each in (model, new))
    unused = {name for name, gradient in had.items() if gradient is None}
    assert {name for name, gradient in has.items() if gradient is None} <= unused
    assert [name for name, g in has.items() if g is not None and not g.isfinite().all()] == []
    assert all(t.isfinite().all() for t in run(spec, new))
    if method not in ("bcn", "ghost_bn", "online"):
        verdict = verify.batch_independence(new, *inputs(spec))
        assert verdict, verdict


def it_can_be_copied_and_saved(spec: Net, new: nn.Module, method: str) -> None:
    new.eval()
    expected = run(spec, new)
    assert all(map(torch.equal, run(spec, copy.deepcopy(new)), expected))
    assert all(map(torch.equal, run(spec, pickle.loads(pickle.dumps(new))), expected))
    buffer = io.BytesIO()
    torch.save(new.state_dict(), buffer)
    buffer.seek(0)
    other = convert(build(spec, seed=5), *inputs(spec, seed=5), method=method).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert close(expected, run(spec, other), 1e-6)


def nothing_is_overwritten(spec: Net, model: nn.Module, new: nn.Module) -> None:
    """A norm layer is a copy: where it goes, what follows it must not write into what it read."""
    if close(run(spec, model), run(spec, out_of_place(model)), 1e-5):
        assert close(run(spec, new), run(spec, out_of_place(new)), 1e-5)


@settings(GRAPHS)
@given(spec=nets, method=methods, seed=st.integers(0, 99))
def test_only_the_chosen_norm_layers_go(spec: Net, method: str, seed: int) -> None:
    model = build(spec)
    norms = {path: module for path, module in model.named_modules() if is_batch_norm_like(module)}
    generator = torch.Generator().manual_seed(seed)
    chosen = [path for path in norms if torch.rand((), generator=generator) < 0.5] or [*norms][:1]
    new = converted(spec, method, model, include=chosen)
    if new is None:
        return
    for path, norm in norms.items():
        now = new.get_submodule(path)
        if path in chosen:
            assert not is_batch_norm_like(now) or isinstance(now, GhostBatchNorm)
        else:
            assert type(now) is type(norm)
            kept = now.state_dict()  # where it ends a branch, Fixup's and SkipInit's scalar is in it, too
            assert all(torch.equal(kept[key], value) for key, value in norm.state_dict().items())
    assert all(t.isfinite().all() for t in run(spec, new))
    rest = converted(spec, method, new)
    assert rest is None or not any(type(m) in map(type, norms.values()) for m in rest.modules())


@settings(GRAPHS)
@given(spec=nets, method=methods)
def test_on_meta_only_the_values_are_missing(spec: Net, method: str) -> None:
    real = converted(spec, method, build(spec))
    example = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), inputs(spec))
    try:
        model = convert(build(spec).to("meta"), *example, method=method)
    except ConversionError:
        assert real is None
        return
    assert real is not None
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in real.state_dict().items()
    }
    model.load_state_dict(real.state_dict(), assign=True)
    assert close(run(spec, real.eval()), run(spec, model.eval()), 1e-6)


def without_ids(found: dict[str, Any]) -> dict[str, Any]:
    kept = {**found}
    for key in ("modules", "parameters"):
        kept[key] = {name: values[1:] for name, values in found[key].items()}
    return kept


def out_of_place(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
        if isinstance(module, Steps) and module.plain is not None:
            module.act = module.plain
    return twin


@settings(GRAPHS)
@given(spec=nets, method=st.sampled_from(("nf", "fixed_variance")))
@example(
    spec=Net(blocks=(Block(kind="twice", parts=(Unit(), Unit())),)), method="fixed_variance"
)  # a second call
@example(
    spec=Net(stem=Unit(order="act conv norm", act="mish", inplace=True)), method="nf"
)  # overwrites its input
@example(
    spec=Net(
        blocks=(Block(parts=(Unit(), Unit(act="identity"), Unit(conv="pointwise", order="conv act norm"))),),
        stem=Unit(width=4),
    ),
    method="nf",
)  # an activation in between
def test_measured_constants_give_unit_variance(spec: Net, method: str) -> None:
    """Behind every constant that was measured, in any surrounding: E[var_c] for `nf`, E[x²] for `fixed_variance`."""
    model = build(spec)
    for module in model.modules():
        if is_noise(module):  # with masks: tests/test_noise.py
            assert hasattr(module, "p")
            module.p = 0.0  # type: ignore[assignment]
    through_sums = {row.path for row in plan(model, *inputs(spec), method=method).layers}
    new = converted(spec, method, model)
    assert new is not None
    sizes: dict[str, tuple[float, float]] = {}

    def hook(path: str) -> Any:
        def look(module: Any, _: Any, out: Tensor) -> None:
            wide = (out / module.alpha if isinstance(module, _ScaledStd) else out).detach().double()
            dim = -1 if isinstance(module, nn.Linear) else 1
            var = wide.movedim(dim, 0).flatten(1).var(1, correction=0).mean()
            square = float(wide.square().mean())
            sizes.setdefault(path, (float(var) if method == "nf" else square, square))

        return look

    for path, module in new.named_modules():
        if measured := measured_constant(module):
            assert measured.square > 0
            module.register_forward_hook(hook(path))
    run(spec, new.eval())
    for path, (size, square) in sizes.items():
        # At most 1: what a norm layer reads through sums may stay as small as it was, and of a `Scale` at a branch's
        # end α is not kept apart. 0: an output that does not vary, of a map of one position or a dead activation.
        # Nor does a root mean square exceed twice what γ and β made of it (1 and 0, or trained ones): means count.
        limited = square > 3.96 or spec.trained
        at_most = limited or path in through_sums or isinstance(new.get_submodule(path), Scale)
        assert size == pytest.approx(1, rel=1e-2) or (at_most and size < 1) or size < 1e-6, (path, size)


@settings(GRAPHS)
@given(spec=nets, method=st.sampled_from(("nf", "ws_gn")), inplace=st.booleans())
def test_baking_keeps_the_function(spec: Net, method: str, inplace: bool) -> None:
    new = converted(spec, method, build(spec))
    if new is None:
        return
    with torch.no_grad():
        for parameter in new.parameters():  # gains and biases as training leaves them
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    new.eval()
    before, expected = state(new), run(spec, new)
    baked = bake(copy.deepcopy(new) if inplace else new, inplace=inplace)
    assert same(before, state(new))
    assert not any(isinstance(module, _ScaledStd) for module in baked.modules())
    assert [path for path, _ in baked.named_modules()] == [path for path, _ in new.named_modules()]
    assert close(expected, run(spec, baked), 1e-4)
    twin = pickle.loads(pickle.dumps(baked))
    assert all(map(torch.equal, run(spec, twin), run(spec, baked)))
    assert repr(bake(baked)) == repr(baked)
    other = bake(convert(build(spec, seed=7), *inputs(spec), method=method)).eval()
    other.load_state_dict(baked.state_dict())
    assert close(run(spec, baked), run(spec, other), 1e-6)


def hostile(model: nn.Module, seed: int, wild: bool) -> None:
    """Statistics of every kind a checkpoint may hold.

    Variances from 1e-6 to 1e4, exactly 0 and subnormal; γ positive, negative and zero. γ grows with σ as in trained
    networks, or is `wild`: then channels are multiplied by up to 700.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not is_batch_norm_like(module):
            continue
        mean, var = module.running_mean, module.running_var
        var.copy_(10 ** torch.empty(len(var)).uniform_(-6, 4, generator=generator))
        kind = torch.randint(8, var.shape, generator=generator)
        mean.normal_(generator=generator).mul_(var.sqrt())
        var[kind == 1], var[kind == 2] = 0.0, 1e-40
        if module.weight is not None:
            gamma = torch.randn(len(var), generator=generator)
            module.weight.data.copy_(gamma if wild else gamma * (var + module.eps).sqrt())
            module.weight.data[kind == 3] = 0.0
            module.bias.data.normal_(generator=generator)


@settings(GRAPHS)
@given(spec=nets, seed=st.integers(0, 2**16), wild=st.booleans())
def test_fold_keeps_the_function(spec: Net, seed: int, wild: bool) -> None:
    """To 1e-10 in double precision; in single precision to 1e-4, or as well as the network itself computes it."""
    model = build(spec).eval()
    hostile(model, seed, wild)
    precise = copy.deepcopy(model).double()
    assume(all(t.isfinite().all() for t in run(spec, model)))
    folded = converted(spec, "fold", model)
    assert folded is not None
    assert not any(is_batch_norm_like(module) for module in folded.modules())
    exact = double(spec, precise)
    assert close(exact, double(spec, convert(precise, *doubled(spec), method="fold")), 1e-10)
    for truth, before, after in zip(exact, run(spec, model), run(spec, folded), strict=True):
        own = float((before.double() - truth).norm())
        error = float((after.double() - truth).norm())
        assert error <= max(1e-4 * float(truth.norm()), 4 * own) + 1e-30, (error, own, float(truth.norm()))


def doubled(spec: Net) -> tuple[Any, ...]:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double(), inputs(spec))


def double(spec: Net, model: nn.Module) -> list[Tensor]:
    with preserved(model), torch.no_grad():
        return leaves(model(*doubled(spec)))
