"""At evaluation a layer remembers its effective weight, and never a stale one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nfnets.layers import ScaledStdConv2d
from nfnets.snapshot import Snapshot

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def make() -> ScaledStdConv2d:
    torch.manual_seed(1)
    layer = ScaledStdConv2d(3, 4, 3, scale=1.7, alpha=0.5).eval()
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return layer


def computed(layer: ScaledStdConv2d, x: Tensor = X) -> Tensor:
    """The same from the state as it is now."""
    weight, bias = layer.effective_weight(), layer.effective_bias()
    return F.conv2d(x.to(weight.dtype), weight, bias)


def step(
    optimizer: Callable[..., torch.optim.Optimizer], **options: Any
) -> Callable[[ScaledStdConv2d], None]:
    def run(layer: ScaledStdConv2d) -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer(layer.parameters(), lr=0.1, **options).step()

    return run


def other_state() -> dict[str, Tensor]:
    return {name: torch.randn_like(value) + 1 for name, value in make().state_dict().items()}


def swap_data(layer: ScaledStdConv2d) -> None:
    """An exponential moving average evaluated in place, as timm and others do."""
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)


def swap_tensors(layer: ScaledStdConv2d) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn_like(layer.weight)))


def permute_in_place(layer: ScaledStdConv2d) -> None:
    layer.weight.data.copy_(layer.weight.data.flip(0, 3).clone())  # the same numbers: a sum would not tell


def same_memory_other_strides(layer: ScaledStdConv2d) -> None:
    layer.weight.data = layer.weight.data.transpose(2, 3)


def by_numpy(layer: ScaledStdConv2d) -> None:
    layer.weight.detach().numpy()[0, 0, 0, 0] = 5


def by_dlpack(layer: ScaledStdConv2d) -> None:
    torch.from_dlpack(layer.weight.detach())[0, 0, 0, 0] = 5


def one_element(layer: ScaledStdConv2d) -> None:
    layer.weight.data[0, 0, 0, 0] += 1e-3


def replace_parameter(layer: ScaledStdConv2d) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def in_inference_mode(layer: ScaledStdConv2d) -> None:
    with torch.inference_mode():
        layer.weight.copy_(torch.randn_like(layer.weight))


def set_data_then_restore_address(layer: ScaledStdConv2d) -> None:
    """Freed memory is handed out again: an address alone would not do."""
    for _ in range(50):
        layer.weight.data = torch.randn_like(layer.weight)


def set_storage(layer: ScaledStdConv2d) -> None:
    with torch.no_grad():
        layer.weight.set_(torch.randn_like(layer.weight))  # type: ignore[call-overload]


WRITERS: dict[str, Callable[[ScaledStdConv2d], Any]] = {
    "weight.data.copy_": lambda layer: layer.weight.data.copy_(torch.randn_like(layer.weight)),
    "weight.data one element": one_element,
    "weight.data permuted": permute_in_place,
    "weight.data assigned": swap_data,
    "weight.data again and again": set_data_then_restore_address,
    "weight.data strides": same_memory_other_strides,
    "gain.data": lambda layer: layer.gain.data.mul_(2),
    "bias.data": lambda layer: layer.bias.data.add_(1),  # type: ignore[union-attr]
    "scale": lambda layer: layer.scale.fill_(3.0),
    "scale.data": lambda layer: layer.scale.data.fill_(3.0),
    "alpha": lambda layer: layer.alpha.mul_(2),
    "alpha replaced": lambda layer: setattr(layer, "alpha", torch.tensor(3.0)),
    "eps": lambda layer: setattr(layer, "eps", 50.0),
    "foreach on data": lambda layer: torch._foreach_mul_([layer.gain.data, layer.bias.data], 3.0),  # type: ignore[union-attr]
    "set_": set_storage,
    "init": lambda layer: layer.reset_parameters(),
    "vector_to_parameters": lambda layer: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in layer.parameters())), layer.parameters()
    ),
    "replaced": replace_parameter,
    "bias removed": lambda layer: setattr(layer, "bias", None),
    "numpy": by_numpy,
    "dlpack": by_dlpack,
    "inference mode": in_inference_mode,
    "sgd": step(torch.optim.SGD),
    "sgd foreach": step(torch.optim.SGD, foreach=True, momentum=0.9),
    "sgd fused": step(torch.optim.SGD, fused=True),
    "adam": step(torch.optim.Adam),
    "adamw fused": step(torch.optim.AdamW, fused=True),
    "load_state_dict": lambda layer: layer.load_state_dict(other_state()),
    "load_state_dict assign": lambda layer: layer.load_state_dict(other_state(), assign=True),
    "double": lambda layer: layer.double(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "half and back": lambda layer: layer.half().float(),
    "to channels last": lambda layer: layer.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "to_empty": lambda layer: layer.to_empty(device="cpu").load_state_dict(other_state()),
    "ema swap": swap_data,
    "swap_tensors": swap_tensors,
}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WRITERS)
def test_never_stale(name: str, guard: Any) -> None:
    layer = make()
    with guard():
        first = layer(X)
        assert layer._remembered is not None
        assert torch.equal(layer(X), first)
    WRITERS[name](layer)
    with guard():
        x = X.to(layer.weight.dtype)
        again = layer(x)
        assert torch.equal(again, computed(layer))
        assert torch.equal(layer(x), again)
    rounding = name in ("double", "bfloat16", "half and back", "to channels last")
    assert rounding or not torch.allclose(again.to(first.dtype), first, atol=1e-5)


@pytest.mark.parametrize(
    "alias",
    [
        lambda layer: layer.weight.data,
        lambda layer: layer.weight.detach(),
        lambda layer: layer.weight[1].data,
        lambda layer: layer.weight.data.view(-1)[5:],
        lambda layer: layer.state_dict()["weight"],
        lambda layer: layer.weight.detach().numpy(),
        lambda layer: np.from_dlpack(layer.weight.detach()),
        lambda layer: layer.weight.untyped_storage(),
    ],
)
@pytest.mark.parametrize("first", ["alias", "forward"])
def test_an_alias_held_and_written_between_forwards(alias: Any, first: str) -> None:
    layer = make()
    with torch.no_grad():
        if first == "forward":
            layer(X)
        held = alias(layer)
        before = layer(X)
        for value in (0.5, 1.5):
            if isinstance(held, torch.UntypedStorage):
                held[2] = int(value * 100)
            else:
                new = np.random.default_rng(int(10 * value)).normal(size=held.shape)
                held[...] = torch.from_numpy(new) if isinstance(held, Tensor) else new
            after = layer(X)
            assert torch.equal(after, computed(layer))
            assert not torch.equal(after, before)
            before = after


def test_two_layers_that_share_a_weight() -> None:
    one, two = make(), make()
    two.weight = one.weight
    with torch.no_grad():
        one(X), two(X)
        assert one._remembered is not None
        assert two._remembered is not None
        one.weight.data.normal_()
        assert torch.equal(two(X), computed(two))  # it remembers the new weight …
        assert torch.equal(one(X), computed(one))  # … which must not vouch for the other's old one
        two.weight.data.normal_()
        assert torch.equal(one(X), computed(one))
        assert torch.equal(two(X), computed(two))


def test_shared_memory_is_not_remembered() -> None:
    """Another process could write there."""
    layer = make().share_memory()
    with torch.no_grad():
        layer(X)
        assert layer._remembered is None


def test_memory_that_pytorch_did_not_allocate_is_not_remembered() -> None:
    layer = make()
    array = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype("f")
    layer.weight = nn.Parameter(torch.from_numpy(array))
    with torch.no_grad():
        layer(X)
        array[:] = np.random.default_rng(1).normal(size=array.shape)
        assert torch.equal(layer(X), computed(layer))


def test_the_weight_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = ScaledStdConv2d.effective_weight
    monkeypatch.setattr(ScaledStdConv2d, "effective_weight", lambda self: calls.append(1) or original(self))
    layer = make()
    for guard in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with guard():
            for _ in range(3):
                layer(X)
    assert len(calls) == 1
    layer.train()
    with torch.no_grad():
        layer(X), layer(X)
    assert len(calls) == 3
    layer.eval()
    layer(X), layer(X)  # with gradients
    assert len(calls) == 5
    with torch.no_grad():
        layer(X), layer(X)
    assert len(calls) == 6


def test_training_and_evaluation_in_turn() -> None:
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        layer.train()
        layer(X).square().mean().backward()
        optimizer.step()
        layer.eval()
        with torch.inference_mode():
            for _ in range(2):
                assert torch.equal(layer(X), computed(layer))


def test_training_in_evaluation_mode() -> None:
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(layer(X), computed(layer))
        layer(X).square().mean().backward()
        assert layer.weight.grad is not None
        optimizer.step()


def test_a_moving_average_kept_in_evaluation_mode() -> None:
    layer = make()
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5)).eval()
    inner: Any = average.module
    for _ in range(3):
        nn.init.normal_(layer.weight)
        average.update_parameters(layer)
        with torch.no_grad():
            assert torch.equal(average(X), computed(inner))
            assert torch.equal(average(X), computed(inner))


def test_a_functional_call_neither_uses_nor_leaves_a_memory() -> None:
    layer = make()
    state = {"weight": torch.randn_like(layer.weight), "gain": torch.rand(4)}
    with torch.no_grad():
        before = layer(X)
        swapped = torch.func.functional_call(layer, state, (X,))
        assert not torch.allclose(swapped, before)
        assert torch.equal(layer(X), before)
        assert torch.equal(torch.func.functional_call(layer, state, (X,)), swapped)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:FutureWarning")
@pytest.mark.parametrize("name", ["weight", "gain"])
def test_a_dual_number_is_not_its_primal(name: str) -> None:
    layer = make()
    with torch.no_grad():
        layer(X)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(getattr(layer, name).detach(), torch.randn_like(getattr(layer, name)))
            out = torch.func.functional_call(layer, {name: dual}, (X,))
            tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is not None
    assert tangent.abs().max() > 0


def test_parametrizations_and_hooks_are_seen() -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

        factor = 1.0

    layer = make()
    with torch.no_grad():
        before = layer(X)
        double = Double()
        nn.utils.parametrize.register_parametrization(layer, "gain", double)
        assert torch.equal(layer(X), before)
        Double.factor = 2.0
        assert torch.equal(layer(X), computed(layer))
        assert not torch.allclose(layer(X), before)
        nn.utils.parametrize.remove_parametrizations(layer, "gain")
        pruned = prune.random_unstructured(make(), "weight", 0.5)
        sparse = pruned(X)
        assert torch.equal(sparse, computed(pruned))
        pruned.weight_mask.zero_()
        assert not torch.equal(pruned(X), sparse)


def test_writing_to_a_remembered_weight_reaches_only_the_weight() -> None:
    """Copy-on-write must be invisible: values, aliases and gradients are as without it."""
    layer = make()
    alias = layer.weight.data
    del alias
    with torch.no_grad():
        layer(X)
    expected = layer.weight.detach().clone()
    assert layer._remembered is not None
    view = layer.weight.data
    view[0] = 7.0
    expected[0] = 7.0
    assert torch.equal(layer.weight, expected)
    assert view.data_ptr() == layer.weight.data_ptr()
    twin = copy.deepcopy(layer)
    twin.weight.data.zero_()
    assert torch.equal(layer.weight, expected)


def test_snapshot_without_its_private_functions_remembers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfnets.snapshot._available", False)
    layer = make()
    with torch.no_grad():
        assert torch.equal(layer(X), computed(layer))
    assert layer._remembered is None


def test_this_pytorch_has_what_a_snapshot_needs() -> None:
    assert Snapshot.take([torch.ones(3), None]) is not None


@pytest.mark.filterwarnings("ignore")
def test_a_trace_records_the_computation() -> None:
    layer = make()
    with torch.no_grad():
        layer(X)
        traced = torch.jit.trace(layer, (X,))  # type: ignore[no-untyped-call]
        assert any(node.kind() == "aten::var_mean" for node in traced.inlined_graph.nodes())
