"""Effective weights computed once for several passes: the same gradients, and never a stale weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nfnets
from nfnets.computed import Computed
from nfnets.errors import UserError
from nfnets.layers import ScaledStdConv2d, ScaledStdConvTranspose2d, ScaledStdLinear

X = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions of several shapes, one called twice, one shared, a transposed one, one that never runs."""

    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = ScaledStdConv2d(3, 6, 3, padding=1, scale=1.7)
        self.twice = ScaledStdConv2d(6, 6, 3, padding=1, groups=2, alpha=0.5)
        self.twin = ScaledStdConv2d(6, 6, 3, padding=1, groups=2)
        self.twin.weight = self.twice.weight
        self.up = ScaledStdConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.unused = ScaledStdConv2d(6, 6, 1)
        self.head = ScaledStdLinear(4, 5)
        self.recompute = recompute

    def body(self, x: Tensor) -> Tensor:
        return self.twin(F.silu(self.twice(F.silu(self.twice(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.body(x) if self.recompute is None else checkpoint(self.body, x, use_reentrant=self.recompute)
        return self.head(self.up(x).mean((2, 3)))


def gradients(
    net: nn.Module, once: bool, passes: Callable[[nn.Module], None] | None = None
) -> list[Tensor | None]:
    net = copy.deepcopy(net)

    def run() -> None:
        if passes is not None:
            passes(net)
        else:
            for x in X:
                net(x).square().mean().backward()

    if once:
        with nfnets.accumulating(net):
            run()
    else:
        run()
    return [p.grad for p in net.parameters()]


def same(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    assert any(grad is not None for grad in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("recompute", [None, False, True], ids=["kept", "recomputed", "reentrant"])
@pytest.mark.parametrize("training", [True, False])
def test_the_same_gradients(recompute: bool | None, training: bool) -> None:
    net = Net(recompute).double().train(training)

    def passes(net: nn.Module) -> None:
        for x in X.double():
            net(x.requires_grad_()).square().mean().backward()

    same(gradients(net, True, passes), gradients(net, False, passes))


@pytest.mark.parametrize("frozen", ["stem", "twice.weight", "up.gain", "head.bias"])
def test_frozen_parts_get_no_gradient(frozen: str) -> None:
    net = Net()
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    same(gradients(net, True), gradients(net, False))


def test_a_frozen_stem_is_not_differentiated() -> None:
    net = Net()
    net.stem.requires_grad_(False)
    with nfnets.accumulating(net):
        assert not net.stem(X[0]).requires_grad
        assert net.twice(net.stem(X[0])).requires_grad


def test_once_for_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, pulled_back = [], []
    original = ScaledStdConv2d.effective_weight

    def counted(layer: ScaledStdConv2d) -> Tensor:
        computed.append(layer)
        weight = original(layer)
        weight.register_hook(lambda _: pulled_back.append(layer))
        return weight

    monkeypatch.setattr(ScaledStdConv2d, "effective_weight", counted)
    net = Net(False)
    with nfnets.accumulating(net):
        for x in X:
            net(x).square().mean().backward()
        assert len(computed) == len(set(computed)) == 4
        assert not pulled_back
    assert set(pulled_back) == {net.stem, net.twice, net.twin}
    assert len(pulled_back) == 3
    assert all(m._remembered is None for m in net.modules() if isinstance(m, Computed))


def test_the_loss_is_the_same_bit_by_bit() -> None:
    net = Net()
    outside = net(X[0])
    with nfnets.accumulating(net):
        assert torch.equal(net(X[0]), outside)


def write_data(layer: ScaledStdConv2d) -> None:
    layer.weight.data.mul_(layer.weight.data.flip(0))


WRITERS: dict[str, Callable[[ScaledStdConv2d], Any]] = {
    "data": write_data,
    "data assigned": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    "gain": lambda layer: layer.gain.data.mul_(2),
    "alpha": lambda layer: layer.alpha.fill_(3.0),
    "eps": lambda layer: setattr(layer, "eps", 50.0),
    "numpy": lambda layer: (
        layer.weight.detach().numpy().fill(2.0) or layer.weight.detach().numpy()[0].fill(1.0)
    ),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
    "fused": lambda layer: stepped(layer, fused=True),
    "foreach": lambda layer: stepped(layer, foreach=True),
    "parametrized": lambda layer: nn.utils.parametrizations.weight_norm(layer),
}


def stepped(layer: nn.Module, **options: Any) -> None:
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.9, **options).step()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", WRITERS)
def test_never_stale(name: str, grad: bool) -> None:
    net = Net()
    with torch.set_grad_enabled(grad), nfnets.accumulating(net):
        net.stem(X[0])
        WRITERS[name](net.stem)
        assert torch.equal(net.stem(X[0]), F.conv2d(X[0], *net.stem.computed(), padding=1))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "parametrized"])
def test_a_step_inside_is_refused(name: str) -> None:
    net = Net()

    def changed_between() -> None:
        with nfnets.accumulating(net):
            net(X[0]).square().mean().backward()
            WRITERS[name](net.stem)

    with pytest.raises(UserError, match="changed inside accumulating"):
        changed_between()
    same(gradients(net, True), gradients(net, False))


def test_after_an_error_nothing_is_left() -> None:
    net = Net()

    def raises() -> None:
        with nfnets.accumulating(net):
            net(X[0]).square().mean().backward()
            raise RuntimeError("theirs")

    with pytest.raises(RuntimeError, match="theirs"):
        raises()
    assert all(p.grad is None for p in net.parameters())
    same(gradients(net, True), gradients(net, False))


def test_a_block_in_a_block_changes_nothing() -> None:
    net = Net()

    def passes(net: nn.Module) -> None:
        for x in X:
            with nfnets.accumulating(net):
                net(x).square().mean().backward()

    same(gradients(net, True, passes), gradients(net, False))


def test_the_step_that_follows_copies_nothing() -> None:
    """The snapshot is gone by then, so an optimizer writes where the weights are."""
    net = Net()
    with nfnets.accumulating(net):
        net(X[0]).square().mean().backward()
    before = [torch._C._data_address(p) for p in net.parameters()]  # type: ignore[attr-defined]
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert before == [torch._C._data_address(p) for p in net.parameters()]  # type: ignore[attr-defined]


def test_hooks_of_parameters_see_the_sum_once() -> None:
    net, seen = Net(), []
    net.stem.weight.register_hook(lambda grad: seen.append(grad.clone()))
    with nfnets.accumulating(net):
        for x in X:
            net(x).square().mean().backward()
        assert not seen
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], net.stem.weight.grad)


def test_parametrized_and_functional_weights_are_their_own() -> None:
    net = Net()
    nn.utils.parametrizations.weight_norm(net.stem)
    with nfnets.accumulating(net):
        for x in X:
            net(x).square().mean().backward()
    ours = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    for x in X:
        net(x).square().mean().backward()
    for mine, p in zip(ours, (p for p in net.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(mine, p.grad)
    plain = Net()
    state = {"head.weight": torch.randn(5, 4)}
    outside = torch.func.functional_call(plain, state, (X[0],))
    with nfnets.accumulating(plain):
        assert torch.equal(torch.func.functional_call(plain, state, (X[0],)), outside)


def test_a_layer_of_someone_elses_runs_what_it_says() -> None:
    class Doubled(ScaledStdConv2d):
        def effective_weight(self) -> Tensor:
            return 2 * super().effective_weight()

    torch.manual_seed(0)
    layer = Doubled(3, 4, 3)
    expected = F.conv2d(X[0], 2 * ScaledStdConv2d.effective_weight(layer), layer.effective_bias())
    assert torch.equal(layer(X[0]), expected)
    with nfnets.accumulating(layer):
        assert torch.equal(layer(X[0]), expected)


def test_a_model_with_nothing_of_ours() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    same(gradients(net, True), gradients(net, False))
    with pytest.raises(UserError), nfnets.accumulating(3):  # type: ignore[arg-type]
        pass


def test_copies_made_inside_are_free_of_it() -> None:
    net = Net()
    with nfnets.accumulating(net):
        net(X[0])
        twin = copy.deepcopy(net)
    assert all(m._remembered is None for m in twin.modules() if isinstance(m, Computed))


def test_a_job_of_several_processes_computes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP's hooks count the gradients of every backward pass: those that come later would hang it."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    net = Net()
    with nfnets.accumulating(net):
        net(X[0]).square().mean().backward()
        assert net.stem.weight.grad is not None
